/* What changes in a directory, or in a whole tree, by inotify(7), told in records until the host resets the stream.
 *
 * The kernel's queue is the only one: while the host takes nothing, nothing is read, and when the queue is full the kernel says
 * so (IN_Q_OVERFLOW). Then all begins anew before that is told, because directories may have come that nobody watches.
 *
 * A directory that appears is watched, and what is in it by then is told as created: some of it may be told twice, none is missed.
 */
#include "watch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include "watched.h"

enum {
	CHANGES = IN_CREATE | IN_MODIFY | IN_CLOSE_WRITE | IN_ATTRIB | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO,
	ENDINGS = IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT,
	/* The two halves of a rename are queued together, but a read may come between them. */
	RENAME_WAIT_MS = 10,
	BATCH = 32 * 1024,
	MAX_RECORD = 2 * PATH_MAX + 128,
};

struct watch {
	struct transfer *transfer;
	int inotify;
	bool recursive, over;
	struct watched watched;
	struct failure failure;
	char root[PATH_MAX];
	struct {
		bool held, directory;
		uint32_t cookie;
		char path[PATH_MAX];
	} leaving; /* the first half of a rename */
	size_t length;
	uint8_t batch[BATCH], events[BATCH];
};

/* Telling. */

static void flush(struct watch *watch)
{
	if (watch->length && !transfer_send(watch->transfer, watch->batch, watch->length))
		watch->over = true;
	watch->length = 0;
}

static void tell(struct watch *watch, const char *kind, const char *path, bool directory, const char *from)
{
	if (watch->length + MAX_RECORD > BATCH)
		flush(watch);
	uint8_t *record = watch->batch + watch->length;
	struct msgpack_writer map = {.bytes = record + 4, .capacity = MAX_RECORD - 4};
	msgpack_write_map(&map, from ? 4 : 3);
	msgpack_write_string(&map, "kind");
	msgpack_write_string(&map, kind);
	msgpack_write_string(&map, "path");
	msgpack_write_bytes(&map, path, strlen(path));
	msgpack_write_string(&map, "dir");
	msgpack_write_integer(&map, directory);
	if (from) {
		msgpack_write_string(&map, "from");
		msgpack_write_bytes(&map, from, strlen(from));
	}
	encode_u32(record, (uint32_t)map.length);
	watch->length += 4 + map.length;
}

/* Watching. */

/* Join with one slash, none after an empty `above`. False when it is longer than any path. */
static bool join(char path[PATH_MAX], const char *above, const char *name)
{
	int length = snprintf(path, PATH_MAX, "%s%s%s", above, *above && *name ? "/" : "", name);
	return length < PATH_MAX;
}

static void give_up(struct watch *watch, int error, const char *call)
{
	fail_call(&watch->failure, error, call);
	watch->over = true;
}

/* Watch the directory `path`; returns whether it was not watched before. One that is gone or no directory is nothing new. */
static bool add(struct watch *watch, const char *path)
{
	char whole[PATH_MAX];
	bool fresh = false;
	if (!join(whole, watch->root, path))
		return false;
	int number = inotify_add_watch(watch->inotify, whole, CHANGES | IN_ONLYDIR | IN_DONT_FOLLOW);
	if (number < 0 && (errno == ENOSPC || errno == ENOMEM))
		give_up(watch, errno, "inotify_add_watch");
	else if (number >= 0 && !watched_set(&watch->watched, number, path, &fresh))
		give_up(watch, ENOMEM, "malloc");
	return fresh;
}

static bool is_directory(int directory, const struct dirent *entry)
{
	struct stat status;
	if (entry->d_type != DT_UNKNOWN)
		return entry->d_type == DT_DIR;
	return fstatat(directory, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(status.st_mode);
}

struct pending {
	struct pending *next;
	char path[];
};

static struct pending *remember(struct watch *watch, struct pending *next, const char *path)
{
	struct pending *pending = malloc(sizeof(*pending) + strlen(path) + 1);
	if (!pending) {
		give_up(watch, ENOMEM, "malloc");
		return next;
	}
	pending->next = next;
	strcpy(pending->path, path);
	return pending;
}

/* Look through one directory; returns the list with the directories in it that are watched from now on. */
static struct pending *look(struct watch *watch, const char *above, struct pending *list, bool told)
{
	char path[PATH_MAX];
	DIR *entries = join(path, watch->root, above) ? opendir(path) : NULL;
	struct dirent *entry;
	while (entries && !watch->over && (entry = readdir(entries))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") || !join(path, above, entry->d_name))
			continue;
		bool directory = is_directory(dirfd(entries), entry);
		if (told)
			tell(watch, "created", path, directory, NULL);
		if (directory && add(watch, path))
			list = remember(watch, list, path);
	}
	if (entries)
		closedir(entries);
	return list;
}

/* Watch all below the directory `path`, telling what is there when `told`. */
static void add_below(struct watch *watch, const char *path, bool told)
{
	struct pending *list = remember(watch, NULL, path);
	while (list) {
		struct pending *first = list;
		list = watch->over ? first->next : look(watch, first->path, first->next, told);
		free(first);
	}
}

static void forget_below(struct watch *watch, const char *path)
{
	int number;
	while ((number = watched_below(&watch->watched, path)) >= 0) {
		inotify_rm_watch(watch->inotify, number);
		watched_remove(&watch->watched, number);
	}
}

static bool begin(struct watch *watch)
{
	bool fresh;
	watch->inotify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	if (watch->inotify < 0)
		return fail_call(&watch->failure, errno, "inotify_init1");
	int number = inotify_add_watch(watch->inotify, watch->root, CHANGES | ENDINGS);
	if (number < 0)
		return fail_call(&watch->failure, errno, "inotify_add_watch");
	if (!watched_set(&watch->watched, number, "", &fresh))
		return fail_call(&watch->failure, ENOMEM, "malloc");
	if (watch->recursive)
		add_below(watch, "", false);
	return !watch->over;
}

static void end(struct watch *watch)
{
	if (watch->inotify >= 0)
		close(watch->inotify);
	watch->inotify = -1;
	watched_free(&watch->watched);
	watch->watched = (struct watched){0};
}

/* Events. */

static void appeared(struct watch *watch, const char *path, bool directory)
{
	tell(watch, "created", path, directory, NULL);
	if (directory && watch->recursive && add(watch, path))
		add_below(watch, path, true);
}

/* The second half of the rename did not come: it led out of what is watched. */
static void settle_rename(struct watch *watch)
{
	if (!watch->leaving.held)
		return;
	watch->leaving.held = false;
	tell(watch, "deleted", watch->leaving.path, watch->leaving.directory, NULL);
	if (watch->leaving.directory)
		forget_below(watch, watch->leaving.path);
}

static void take_arrival(struct watch *watch, const struct inotify_event *event, const char *path)
{
	bool directory = event->mask & IN_ISDIR;
	if (watch->leaving.held && watch->leaving.cookie == event->cookie) {
		watch->leaving.held = false;
		tell(watch, "moved", path, directory, watch->leaving.path);
		if (directory)
			watched_rename(&watch->watched, watch->leaving.path, path, PATH_MAX);
		return;
	}
	appeared(watch, path, directory);
}

static void take_departure(struct watch *watch, const struct inotify_event *event, const char *path)
{
	watch->leaving.held = true;
	watch->leaving.directory = event->mask & IN_ISDIR;
	watch->leaving.cookie = event->cookie;
	strcpy(watch->leaving.path, path);
}

static void take_change(struct watch *watch, const struct inotify_event *event, const char *path)
{
	bool directory = event->mask & IN_ISDIR;
	if (event->mask & IN_MOVED_TO) {
		take_arrival(watch, event, path);
		return;
	}
	if (event->mask & IN_MOVED_FROM) {
		take_departure(watch, event, path);
		return;
	}
	if (event->mask & IN_CREATE)
		appeared(watch, path, directory);
	else if (event->mask & IN_DELETE)
		tell(watch, "deleted", path, directory, NULL);
	else if (event->mask & IN_MODIFY)
		tell(watch, "modified", path, directory, NULL);
	else if (event->mask & IN_CLOSE_WRITE)
		tell(watch, "written", path, directory, NULL);
	else if (event->mask & IN_ATTRIB)
		tell(watch, "attributes", path, directory, NULL);
}

static void root_gone(struct watch *watch, bool directory)
{
	tell(watch, "deleted", "", directory, NULL);
	flush(watch);
	watch->over = true;
}

/* An event of the watched thing itself. Of a directory below the root its parent has told already. */
static void take_own(struct watch *watch, const struct inotify_event *event, bool root)
{
	if (root && event->mask & (ENDINGS | IN_IGNORED)) {
		root_gone(watch, event->mask & IN_ISDIR);
	} else if (event->mask & IN_IGNORED) {
		watched_remove(&watch->watched, event->wd);
	} else if (root) {
		take_change(watch, event, "");
	}
}

static void take_event(struct watch *watch, const struct inotify_event *event)
{
	char path[PATH_MAX];
	if (!(event->mask & IN_MOVED_TO && event->cookie == watch->leaving.cookie))
		settle_rename(watch);
	const char *above = watched_path(&watch->watched, event->wd);
	if (!above)
		return;
	if (!event->len)
		take_own(watch, event, !*above);
	else if (join(path, above, event->name))
		take_change(watch, event, path);
}

static void begin_anew(struct watch *watch)
{
	settle_rename(watch);
	end(watch);
	if (begin(watch)) {
		tell(watch, "overflow", "", true, NULL);
	} else if (watch->failure.error == ENOENT) {
		root_gone(watch, true);
		watch->failure.call = NULL;
	} else {
		watch->over = true;
	}
}

static void take_events(struct watch *watch)
{
	ssize_t length = read(watch->inotify, watch->events, sizeof(watch->events));
	for (ssize_t at = 0; at < length && !watch->over;) {
		const struct inotify_event *event = (const void *)(watch->events + at);
		if (event->mask & IN_Q_OVERFLOW) {
			begin_anew(watch); /* what else was read has numbers of before */
			return;
		}
		take_event(watch, event);
		at += (ssize_t)(sizeof(*event) + event->len);
	}
}

static void follow(struct watch *watch, int wake)
{
	while (!watch->over) {
		struct pollfd sources[] = {{.fd = watch->inotify, .events = POLLIN}, {.fd = wake, .events = POLLIN}};
		int ready = poll(sources, 2, watch->leaving.held ? RENAME_WAIT_MS : -1);
		if (sources[1].revents)
			return;
		if (ready == 0)
			settle_rename(watch);
		else if (ready > 0)
			take_events(watch);
		if (!watch->leaving.held)
			flush(watch);
	}
}

/* The operation. */

void watch_run(struct transfer *transfer)
{
	struct watch *watch = calloc(1, sizeof(*watch));
	int wake = transfer_wake(transfer);
	if (!watch || wake < 0) {
		transfer_fail(transfer, &(struct failure){ENOMEM, "malloc"});
		free(watch);
		return;
	}
	watch->transfer = transfer;
	watch->inotify = -1;
	watch->recursive = request_flag(transfer->request, "recursive", false);
	if (!request_path(transfer->request, "path", watch->root, &watch->failure) || !begin(watch)) {
		transfer_fail(transfer, &watch->failure);
	} else {
		transfer_done(transfer);
		follow(watch, wake);
		if (watch->failure.call)
			transfer_abort(transfer, watch->failure.error);
		else
			transfer_end(transfer);
	}
	end(watch);
	free(watch);
}
