/* A layer is a directory of the guest's own disk: lower/ (the host's files, read-only), upper/ (what the guest made of them) and
 * work/ (overlayfs' own). Only root enters it; programs see `view` (Documentation/filesystems/overlayfs.rst).
 */
#include "review.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "log.h"
#include "tree.h"

/* redirect_dir: renaming a directory of the lower layer must not be EXDEV, package managers do it.
 * index=off: it ties the upper layer to file handles of the lower one, which are others when another process serves it.
 * metacopy=off: a file of the upper layer is whole, so it can be read without the lower one.
 * xino=off: inode numbers stay those of the host, which git's index remembers. */
#define OVERLAY_OPTIONS "redirect_dir=on,index=off,metacopy=off,xino=off"
#define XATTR "trusted.overlay."

enum { OPEN_DIRECTORIES = 64 };
static const struct owner ROOT_OWNER = {0, 0};

static bool part_of(const char *layer, const char *name, char path[PATH_MAX], struct failure *failure)
{
	return snprintf(path, PATH_MAX, "%s/%s", layer, name) < PATH_MAX || fail_call(failure, ENAMETOOLONG, "layer");
}

static bool make(const char *path, struct failure *failure)
{
	return mkdir(path, 0700) == 0 || errno == EEXIST || fail_call(failure, errno, "mkdir");
}

bool review_lower(const char *layer, char lower[PATH_MAX], struct failure *failure)
{
	struct failure there = {0};
	if (!tree_make_parents(layer, ROOT_OWNER, &there) && there.error != EEXIST)
		return fail_call(failure, there.error, there.call);
	return make(layer, failure) && part_of(layer, "lower", lower, failure) && make(lower, failure);
}

/* The root of what is seen has the attributes of the upper directory, so that takes the lower one's. */
static bool make_upper(const char *lower, const char *upper, struct failure *failure)
{
	struct stat status;
	if (mkdir(upper, 0700) < 0)
		return errno == EEXIST || fail_call(failure, errno, "mkdir");
	if (stat(lower, &status) < 0)
		return fail_call(failure, errno, "stat");
	const struct timespec times[2] = {status.st_atim, status.st_mtim};
	return (chown(upper, status.st_uid, status.st_gid) == 0 || fail_call(failure, errno, "chown")) &&
	       (chmod(upper, status.st_mode & 07777) == 0 || fail_call(failure, errno, "chmod")) &&
	       (utimensat(AT_FDCWD, upper, times, 0) == 0 || fail_call(failure, errno, "utimensat"));
}

bool review_cover(const char *layer, const char *view, struct failure *failure)
{
	char lower[PATH_MAX], upper[PATH_MAX], work[PATH_MAX], options[4 * PATH_MAX];
	if (!part_of(layer, "lower", lower, failure) || !part_of(layer, "upper", upper, failure) ||
	    !part_of(layer, "work", work, failure) || !make_upper(lower, upper, failure) || !make(work, failure))
		return false;
	snprintf(options, sizeof(options), "lowerdir=%s,upperdir=%s,workdir=%s," OVERLAY_OPTIONS, lower, upper, work);
	return mount("taskvm", view, "overlay", MS_NOSUID | MS_NODEV, options) == 0 || fail_call(failure, errno, "mount");
}

bool review_uncover(const char *view, struct failure *failure)
{
	return umount2(view, UMOUNT_NOFOLLOW) == 0 || fail_call(failure, errno, "umount");
}

static bool remove_part(const char *layer, const char *name, struct failure *failure)
{
	char path[PATH_MAX];
	struct stat status;
	if (!part_of(layer, name, path, failure))
		return false;
	if (lstat(path, &status) < 0)
		return errno == ENOENT || fail_call(failure, errno, "stat");
	return tree_remove(path, failure);
}

/* What overlayfs held of the lower layer, and of names that were not there, is looked up afresh (sysctl/vm.rst, drop_caches). */
static void forget_names(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "2", 1) < 0)
		say("write drop_caches: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

bool review_renew(const char *layer, const char *view, struct failure *failure)
{
	if (!review_uncover(view, failure))
		return false;
	forget_names();
	struct failure ignored = {0};
	bool removed = remove_part(layer, "upper", failure) && remove_part(layer, "work", failure);
	/* A layer that could not be emptied is shown again as it is: programs must not find the bare mount point. */
	return review_cover(layer, view, removed ? failure : &ignored) && removed;
}

/* To the owner it has: overlayfs copies what is changed up, links too, and this changes nothing. */
static int copy_up(const char *path, const struct stat *status, int type, struct FTW *place)
{
	(void)type, (void)place;
	return lchown(path, status->st_uid, status->st_gid) < 0 && errno != EROFS; /* another mount of the host's, inside */
}

void review_settle(struct transfer *transfer)
{
	struct failure failure = {0};
	char path[PATH_MAX];
	/* Not FTW_MOUNT: overlayfs gives what it has not copied a device number of its own. */
	if (request_path(transfer->request, "path", path, &failure) && nftw(path, copy_up, OPEN_DIRECTORIES, FTW_PHYS))
		fail_call(&failure, errno, "chown");
	if (failure.error)
		transfer_fail(transfer, &failure);
	else
		transfer_done(transfer);
}

static bool has_mark(int fd, const char *name)
{
	return fgetxattr(fd, name, NULL, 0) >= 0;
}

const char *review_mark(int directory, const char *name, const struct stat *status)
{
	if (S_ISCHR(status->st_mode) && status->st_rdev == makedev(0, 0))
		return "whiteout";
	if (!S_ISDIR(status->st_mode) && !S_ISREG(status->st_mode))
		return "new"; /* trusted attributes of links and the like need their path; what they stand for is in their type */
	int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return "new";
	const char *mark = has_mark(fd, XATTR "redirect") ? "redirect"
			   : has_mark(fd, XATTR "opaque")  ? "opaque"
			   : has_mark(fd, XATTR "origin")  ? "copied"
							   : "new";
	close(fd);
	return mark;
}
