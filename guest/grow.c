/* The root file system grows into a disk that the host has made larger, while it is mounted: what resize2fs does, which not every
 * image has. The host resizes first; the driver hears of it by an interrupt and says so in a uevent. */
#include "grow.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "boot.h"
#include "kernel.h"
#include "uevents.h"

enum { NEWS_MS = 10000 };

static bool wait_for_size(int disk, int uevents, uint64_t size, struct failure *failure)
{
	int64_t deadline = uevents_now() + NEWS_MS;
	for (;;) {
		uint64_t now;
		if (ioctl(disk, DISK_SIZE, &now) < 0)
			return fail_call(failure, errno, "BLKGETSIZE64");
		if (now >= size)
			return true;
		if (!uevents_wait(uevents, deadline))
			return fail_call(failure, ETIMEDOUT, "the disk's new size");
	}
}

static bool grow(int root, uint64_t size, struct failure *failure)
{
	struct statvfs status;
	if (fstatvfs(root, &status) < 0)
		return fail_call(failure, errno, "fstatvfs");
	uint64_t blocks = size / status.f_frsize;
	return ioctl(root, EXT4_RESIZE, &blocks) == 0 || fail_call(failure, errno, "EXT4_IOC_RESIZE_FS");
}

void grow_root(struct transfer *transfer)
{
	struct failure failure = {0};
	int64_t size = request_integer(transfer->request, "size", 0);
	int uevents = uevents_open(), disk = open(ROOT_DISK, O_RDONLY | O_CLOEXEC);
	int root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (size <= 0)
		fail_call(&failure, EINVAL, "size");
	else if (uevents < 0 || disk < 0 || root < 0)
		fail_call(&failure, errno, "open");
	else if (wait_for_size(disk, uevents, (uint64_t)size, &failure))
		grow(root, (uint64_t)size, &failure);
	if (failure.call)
		transfer_fail(transfer, &failure);
	else
		transfer_done(transfer);
	const int descriptors[] = {uevents, disk, root};
	for (size_t i = 0; i < ARRAY_SIZE(descriptors); i++)
		if (descriptors[i] >= 0)
			close(descriptors[i]);
}
