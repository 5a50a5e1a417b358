/* The directories of one watch: which path each of inotify's numbers stands for. No system calls; tested on the host. */
#ifndef TASKVM_WATCHED_H
#define TASKVM_WATCHED_H

#include <stdbool.h>
#include <stddef.h>

struct watched {
	struct watched_dir {
		int number;
		char *path; /* below the watched root, which is "" */
	} *dirs;            /* by number: inotify counts up, so a new one goes last */
	size_t count, capacity;
};

/* Give `number` the path, a copy of which is kept. `*fresh` says that it had none. False when memory is out. */
bool watched_set(struct watched *watched, int number, const char *path, bool *fresh);
/* The path of a number, or NULL. */
const char *watched_path(const struct watched *watched, int number);
void watched_remove(struct watched *watched, int number);
/* The directory `from` is now `to`, with all below it. Paths that become longer than `limit` are left as they are. */
void watched_rename(struct watched *watched, const char *from, const char *to, size_t limit);
/* The number of `path` itself or of some directory below it, or -1. */
int watched_below(const struct watched *watched, const char *path);
void watched_free(struct watched *watched);

#endif
