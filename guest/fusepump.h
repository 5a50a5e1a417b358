/* FUSE mounts whose requests are answered by the host: messages go unchanged between /dev/fuse and the fs port. */
#ifndef TASKVM_FUSEPUMP_H
#define TASKVM_FUSEPUMP_H

#include "transfer.h"

/* Serve the fs port in a thread of its own. */
void fusepump_start(int fd);
/* The operations of the control port. */
void fusepump_mount(struct transfer *transfer);
void fusepump_unmount(struct transfer *transfer);
void fusepump_renew(struct transfer *transfer);

#endif
