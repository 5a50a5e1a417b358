/* Start one program in a cgroup of its own: the blocking half of exec, run in a pool's thread. */
#ifndef TASKVM_SPAWN_H
#define TASKVM_SPAWN_H

#include <sys/types.h>

#include "pool.h"
#include "request.h"

struct spawn {
	struct job job;
	struct request *request;
	/* What came of it. Descriptors are -1 where there is none; `err` is -1 when merged. */
	int in, out, err, cgroup;
	bool tty; /* `in` and `out` are the same terminal, `err` is -1 */
	volatile pid_t pid; /* set by the kernel before the child runs */
	struct failure failure;
};

/* Prepare `spawn` for pool_submit: its `job.run` is set here, `job.done` by the caller. Takes the request. */
void spawn_init(struct spawn *spawn, struct request *request);
/* Free what spawn_init took, not the descriptors. */
void spawn_free(struct spawn *spawn);

#endif
