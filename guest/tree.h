/* Directories with what is above and below them. */
#ifndef TASKVM_TREE_H
#define TASKVM_TREE_H

#include <stdbool.h>
#include <sys/types.h>

#include "request.h"

/* Who a new file or directory belongs to. */
struct owner {
	uid_t uid;
	gid_t gid;
};

/* Make every missing directory above `path`, with mode 0755 less nothing: the agent has no umask. */
bool tree_make_parents(const char *path, struct owner owner, struct failure *failure);
/* Make one directory of exactly this mode and owner. */
bool tree_make_directory(const char *path, mode_t mode, struct owner owner, struct failure *failure);
/* Remove a directory and all below it, without following a symlink or entering another file system. */
bool tree_remove(const char *path, struct failure *failure);

#endif
