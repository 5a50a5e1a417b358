/* Making and removing trees. Removal keeps its place in an array, not on the stack: the guest decides how deep a tree is. */
#include "tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool tree_make_directory(const char *path, mode_t mode, struct owner owner, struct failure *failure)
{
	if (mkdir(path, mode) < 0)
		return fail_call(failure, errno, "mkdir");
	if (!owner.uid && !owner.gid)
		return true;
	/* Not chown(path): whoever owns the directory above may have put a link to another's file in its place. */
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return fail_call(failure, errno, "open");
	bool good = fchown(fd, owner.uid, owner.gid) == 0 || fail_call(failure, errno, "fchown");
	close(fd);
	return good;
}

bool tree_make_parents(const char *path, struct owner owner, struct failure *failure)
{
	char parent[PATH_MAX];
	for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		memcpy(parent, path, (size_t)(slash - path));
		parent[slash - path] = 0;
		if (!tree_make_directory(parent, 0755, owner, failure) && failure->error != EEXIST)
			return false;
	}
	return true;
}

/* Removal. */

struct level {
	DIR *entries;
	char name[NAME_MAX + 1]; /* in the level above */
};

struct removal {
	struct level *levels;
	size_t depth, room;
	dev_t device;
};

static bool enter(struct removal *removal, int directory, const char *name, struct failure *failure)
{
	if (removal->depth == removal->room) {
		size_t room = removal->room ? 2 * removal->room : 16;
		struct level *levels = realloc(removal->levels, room * sizeof(*levels));
		if (!levels)
			return fail_call(failure, ENOMEM, "malloc");
		removal->levels = levels;
		removal->room = room;
	}
	int fd = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return fail_call(failure, errno, "open");
	struct stat status;
	DIR *entries = fstat(fd, &status) == 0 ? fdopendir(fd) : NULL;
	if (!entries || (removal->depth && status.st_dev != removal->device)) {
		int error = entries ? EXDEV : errno;
		if (entries)
			closedir(entries);
		else
			close(fd);
		return fail_call(failure, error, "open");
	}
	removal->device = status.st_dev;
	struct level *level = &removal->levels[removal->depth++];
	level->entries = entries;
	strncpy(level->name, removal->depth > 1 ? name : "", NAME_MAX);
	level->name[NAME_MAX] = 0;
	return true;
}

static void leave(struct removal *removal)
{
	closedir(removal->levels[--removal->depth].entries);
}

/* Remove the next entry of the deepest level, or that level itself once it is empty. */
static bool step(struct removal *removal, struct failure *failure)
{
	struct level *level = &removal->levels[removal->depth - 1];
	int directory = dirfd(level->entries);
	errno = 0;
	struct dirent *entry = readdir(level->entries);
	if (!entry && errno)
		return fail_call(failure, errno, "readdir");
	if (!entry) {
		char name[NAME_MAX + 1];
		memcpy(name, level->name, sizeof(name));
		leave(removal);
		if (removal->depth && unlinkat(dirfd(removal->levels[removal->depth - 1].entries), name, AT_REMOVEDIR) < 0)
			return fail_call(failure, errno, "rmdir");
		return true;
	}
	if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
		return true;
	if (entry->d_type != DT_DIR) {
		if (unlinkat(directory, entry->d_name, 0) == 0 || errno == ENOENT)
			return true;
		if (errno != EISDIR && errno != EPERM) /* EPERM: POSIX's word for a directory; d_type may be unknown */
			return fail_call(failure, errno, "unlink");
	}
	return enter(removal, directory, entry->d_name, failure);
}

bool tree_remove(const char *path, struct failure *failure)
{
	struct removal removal = {0};
	bool good = enter(&removal, AT_FDCWD, path, failure);
	while (good && removal.depth)
		good = step(&removal, failure);
	while (removal.depth)
		leave(&removal);
	free(removal.levels);
	return good && (rmdir(path) == 0 || fail_call(failure, errno, "rmdir"));
}
