/* Which exec a redirected connection came from. */
#ifndef TASKVM_ORIGIN_H
#define TASKVM_ORIGIN_H

#include <netinet/in.h>
#include <stdint.h>

/* Prepare; without the kernel's sock_diag every origin is unknown. */
void origin_init(void);
/* The exec whose program holds the other end of `fd`, which it connected to `destination`; 0 when that is not known. */
uint32_t origin_exec(int fd, const struct sockaddr_in *destination);

#endif
