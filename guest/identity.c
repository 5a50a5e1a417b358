/* identity (docs/protocol-control.md): in this order, and while every exec is still frozen. */
#include "identity.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"
#include "tree.h"

enum { LEAST_ENTROPY = 32, MAX_APPENDED_TO = 16 * 1024 * 1024 };

static bool add_entropy(const struct request *request, struct failure *failure)
{
	struct msgpack_value value;
	struct random_pool_info pool;
	if (!request_find(request, "entropy", &value) || value.type != MSGPACK_BYTES || value.length < LEAST_ENTROPY ||
	    value.length > sizeof(pool.bytes))
		return fail_call(failure, EINVAL, "entropy");
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return fail_call(failure, errno, "open /dev/urandom");
	pool.size = (int)value.length;
	pool.entropy_bits = 8 * pool.size;
	memcpy(pool.bytes, value.bytes, value.length);
	bool good = true;
	if (ioctl(fd, RANDOM_ADD_ENTROPY, &pool) < 0)
		good = fail_call(failure, errno, "RNDADDENTROPY");
	else if (ioctl(fd, RANDOM_RESEED) < 0) /* the first alone leaves two forks with equal random numbers */
		good = fail_call(failure, errno, "RNDRESEEDCRNG");
	close(fd);
	return good;
}

static bool set_clock(const struct request *request, struct failure *failure)
{
	int64_t now = request_integer(request, "time_ns", -1);
	if (now < 0)
		return fail_call(failure, EINVAL, "time_ns");
	struct timespec time = {.tv_sec = now / 1000000000, .tv_nsec = now % 1000000000};
	return clock_settime(CLOCK_REALTIME, &time) == 0 || fail_call(failure, errno, "clock_settime");
}

static bool set_hostname(const struct request *request, struct failure *failure)
{
	struct msgpack_value value;
	if (!request_find(request, "hostname", &value) || value.type != MSGPACK_BYTES)
		return fail_call(failure, EINVAL, "hostname");
	return sethostname((const char *)value.bytes, value.length) == 0 || fail_call(failure, errno, "sethostname");
}

/* Files. */

static bool contains(int fd, const struct msgpack_value *data, bool *found, struct failure *failure)
{
	struct stat status;
	*found = false;
	if (fstat(fd, &status) < 0)
		return fail_call(failure, errno, "fstat");
	if (status.st_size > MAX_APPENDED_TO)
		return fail_call(failure, EFBIG, "read");
	uint8_t *bytes = malloc((size_t)status.st_size + 1);
	if (!bytes)
		return fail_call(failure, ENOMEM, "malloc");
	ssize_t length = pread(fd, bytes, (size_t)status.st_size, 0);
	if (length < 0)
		fail_call(failure, errno, "read");
	else
		*found = memmem(bytes, (size_t)length, data->bytes, data->length) != NULL;
	free(bytes);
	return length >= 0;
}

static bool write_data(int fd, bool append, const struct msgpack_value *data, struct failure *failure)
{
	bool found = false;
	if (append && !contains(fd, data, &found, failure))
		return false;
	if (found)
		return true;
	ssize_t count = write(fd, data->bytes, data->length);
	if (count < 0 || (size_t)count != data->length)
		return fail_call(failure, count < 0 ? errno : ENOSPC, "write");
	return true;
}

static bool write_file(const struct request *file, struct failure *failure)
{
	char path[PATH_MAX];
	struct msgpack_value data;
	struct owner owner = {(uid_t)request_integer(file, "uid", 0), (gid_t)request_integer(file, "gid", 0)};
	bool append = request_flag(file, "append", false);
	if (!request_path(file, "path", path, failure))
		return false;
	if (!request_find(file, "data", &data) || data.type != MSGPACK_BYTES)
		return fail_call(failure, EINVAL, "data");
	const int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | (append ? O_APPEND : O_TRUNC);
	int fd = open(path, flags, 0600);
	if (fd < 0 && errno == ENOENT) {
		if (!tree_make_parents(path, (struct owner){0, 0}, failure))
			return false;
		fd = open(path, flags, 0600);
	}
	if (fd < 0)
		return fail_call(failure, errno, "open");
	bool good = write_data(fd, append, &data, failure);
	if (good && fchown(fd, owner.uid, owner.gid) < 0)
		good = fail_call(failure, errno, "fchown");
	if (good && fchmod(fd, (mode_t)request_integer(file, "mode", 0644) & 07777) < 0)
		good = fail_call(failure, errno, "fchmod");
	close(fd);
	return good;
}

static bool write_files(const struct request *request, struct failure *failure)
{
	struct msgpack_value list, item;
	if (!request_find(request, "files", &list) || list.type == MSGPACK_NIL)
		return true;
	if (list.type != MSGPACK_ARRAY)
		return fail_call(failure, EINVAL, "files");
	struct msgpack_reader reader = {list.bytes, request->map + request->length};
	for (size_t i = 0; i < list.length; i++) {
		const uint8_t *start = reader.next;
		if (!msgpack_read_whole(&reader, &item) || item.type != MSGPACK_MAP)
			return fail_call(failure, EINVAL, "files");
		const struct request file = {.length = (size_t)(reader.next - start), .map = start};
		if (!write_file(&file, failure))
			return false;
	}
	return true;
}

void identity_take(struct transfer *transfer)
{
	const struct request *request = transfer->request;
	struct failure failure = {0};
	if (add_entropy(request, &failure) && set_clock(request, &failure) && set_hostname(request, &failure) &&
	    write_files(request, &failure))
		transfer_done(transfer);
	else
		transfer_fail(transfer, &failure);
}
