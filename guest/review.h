/* Review mounts: overlayfs above a mount of the host's, so that what programs write stays in the guest until somebody has looked. */
#ifndef TASKVM_REVIEW_H
#define TASKVM_REVIEW_H

#include <sys/stat.h>

#include "transfer.h"

/* What an entry of an upper directory stands for, in the words of the protocol. */
const char *review_mark(int directory, const char *name, const struct stat *status);

/* Where the lower mount of a layer goes; false when the path becomes too long. */
bool review_lower(const char *layer, char lower[PATH_MAX], struct failure *failure);
/* Show the layer's lower mount at `view`, with what the layer's upper directory holds above it. */
bool review_cover(const char *layer, const char *view, struct failure *failure);
bool review_uncover(const char *view, struct failure *failure);
/* Drop everything that the upper directory holds. EBUSY while a program has something open at `view`. */
bool review_renew(const char *layer, const char *view, struct failure *failure);
/* The operation `settle`: make the upper layer hold all that is below a path, so that it needs the lower one no more there. */
void review_settle(struct transfer *transfer);

#endif
