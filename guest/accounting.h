/* What one exec may use of the guest, and what it has used, by its cgroup (cgroup-v2.rst).
 *
 * It binds and counts what a program does by itself. A guest's root can leave its cgroup: for that there is the host.
 */
#ifndef TASKVM_ACCOUNTING_H
#define TASKVM_ACCOUNTING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "msgpack.h"
#include "request.h"

/* Apply the map `limits` of a request to the cgroup; an absent one is no limit. False and `failure` at the first refused. */
bool accounting_limit(int group, const struct request *request, struct failure *failure);
/* Write the map of what the cgroup's processes have used until now. What the kernel does not tell is 0. */
void accounting_write(struct msgpack_writer *map, int group);

#endif
