/* The file operations of the control port (docs/protocol-control.md, Operations). */
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"
#include "review.h"
#include "tree.h"

enum { MODE_BITS = 07777 };

static const char *type_name(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG: return "file";
	case S_IFDIR: return "dir";
	case S_IFLNK: return "symlink";
	case S_IFIFO: return "fifo";
	case S_IFSOCK: return "socket";
	case S_IFBLK: return "block";
	default: return "char";
	}
}

static void write_field(struct msgpack_writer *map, const char *key, int64_t value)
{
	msgpack_write_string(map, key);
	msgpack_write_integer(map, value);
}

static void write_mtime(struct msgpack_writer *map, const struct stat *status)
{
	write_field(map, "mtime_ns", (int64_t)status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec);
}

static void write_type(struct msgpack_writer *map, const struct stat *status)
{
	msgpack_write_string(map, "type");
	msgpack_write_string(map, type_name(status->st_mode));
	write_field(map, "mode", status->st_mode & MODE_BITS);
	write_field(map, "size", status->st_size);
}

static struct owner requested_owner(const struct request *request)
{
	return (struct owner){
		(uid_t)request_integer(request, "uid", 0),
		(gid_t)request_integer(request, "gid", 0),
	};
}

static mode_t requested_mode(const struct request *request, mode_t otherwise)
{
	return (mode_t)request_integer(request, "mode", otherwise) & MODE_BITS;
}

/* read */

static int open_regular(const struct request *request, struct stat *status, struct failure *failure)
{
	char path[PATH_MAX];
	if (!request_path(request, "path", path, failure))
		return -1;
	int links = request_flag(request, "follow", true) ? 0 : O_NOFOLLOW;
	/* O_NONBLOCK: opening a FIFO must not wait for its writer. */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | links);
	if (fd < 0) {
		fail_call(failure, errno, "open");
		return -1;
	}
	if (fstat(fd, status) < 0)
		fail_call(failure, errno, "fstat");
	else if (!S_ISREG(status->st_mode))
		fail_call(failure, S_ISDIR(status->st_mode) ? EISDIR : EINVAL, "read");
	else
		return fd;
	close(fd);
	return -1;
}

static void reply_reading(struct transfer *transfer, const struct stat *status)
{
	uint8_t bytes[96];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, 3);
	write_field(&map, "size", status->st_size);
	write_field(&map, "mode", status->st_mode & MODE_BITS);
	write_mtime(&map, status);
	transfer_reply(transfer, &map);
}

static void send_contents(struct transfer *transfer, int fd, uint8_t *piece)
{
	int64_t offset = request_integer(transfer->request, "offset", 0);
	int64_t left = request_integer(transfer->request, "length", -1);
	while (left) {
		size_t size = left < 0 || left > MAX_DATA ? MAX_DATA : (size_t)left;
		ssize_t count = pread(fd, piece, size, offset);
		if (count < 0) {
			transfer_abort(transfer, errno);
			return;
		}
		if (count == 0)
			break;
		if (!transfer_send(transfer, piece, (size_t)count))
			return;
		offset += count;
		left -= left < 0 ? 0 : count;
	}
	transfer_end(transfer);
}

void files_read(struct transfer *transfer)
{
	struct failure failure = {0};
	struct stat status;
	uint8_t *piece = malloc(MAX_DATA);
	int fd = -1;
	if (!piece)
		fail_call(&failure, ENOMEM, "malloc");
	else if (request_integer(transfer->request, "offset", 0) < 0)
		fail_call(&failure, EINVAL, "offset");
	else
		fd = open_regular(transfer->request, &status, &failure);
	if (fd < 0) {
		transfer_fail(transfer, &failure);
	} else {
		reply_reading(transfer, &status);
		send_contents(transfer, fd, piece);
		close(fd);
	}
	free(piece);
}

/* write */

/* A new file beside `path`: `temporary` becomes its name. */
static int create_beside(const char *path, char temporary[PATH_MAX], uint32_t stream, struct failure *failure)
{
	const char *slash = strrchr(path, '/');
	int length = slash ? (int)(slash - path + 1) : 0;
	if (snprintf(temporary, PATH_MAX, "%.*s.taskvm-%x", length, path, stream) >= PATH_MAX) {
		fail_call(failure, ENAMETOOLONG, "path");
		return -1;
	}
	int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0 && errno == EEXIST && unlink(temporary) == 0) /* left by an agent that lost power */
		fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		fail_call(failure, errno, "open");
	return fd;
}

static bool write_all(int fd, const uint8_t *bytes, size_t length, struct failure *failure)
{
	while (length) {
		ssize_t count = write(fd, bytes, length);
		if (count < 0)
			return fail_call(failure, errno, "write");
		bytes += count;
		length -= (size_t)count;
	}
	return true;
}

/* Receive into `fd`. False when a call failed, or, with `failure` clear, when the host has given up. */
static bool receive_contents(struct transfer *transfer, int fd, int64_t *size, struct failure *failure)
{
	uint8_t *piece = malloc(MAX_DATA);
	if (!piece)
		return fail_call(failure, ENOMEM, "malloc");
	ssize_t count;
	bool good = true;
	while (good && (count = transfer_receive(transfer, piece, MAX_DATA)) > 0) {
		good = write_all(fd, piece, (size_t)count, failure);
		*size += count;
	}
	free(piece);
	return good && count == 0;
}

static bool set_owner_and_mode(int fd, struct owner owner, mode_t mode, struct failure *failure)
{
	struct stat status;
	if (fstat(fd, &status) < 0)
		return fail_call(failure, errno, "fstat");
	/* Only when it changes: a mount may refuse chown and yet have made the file as the right user. */
	if ((status.st_uid != owner.uid || status.st_gid != owner.gid) && fchown(fd, owner.uid, owner.gid) < 0)
		return fail_call(failure, errno, "fchown");
	return fchmod(fd, mode) == 0 || fail_call(failure, errno, "fchmod");
}

/* Set the time of last modification, when the request names one. */
static bool set_mtime(int fd, const struct request *request, struct failure *failure)
{
	int64_t mtime = request_integer(request, "mtime_ns", -1);
	if (mtime < 0)
		return true;
	struct timespec times[2] = {
		{.tv_nsec = UTIME_OMIT},
		{.tv_sec = mtime / 1000000000, .tv_nsec = mtime % 1000000000},
	};
	return futimens(fd, times) == 0 || fail_call(failure, errno, "futimens");
}

/* The mode of a file that replaces what is at `path`: unless the request names one, a script stays executable. */
static mode_t replacement_mode(const struct request *request, const char *path)
{
	struct stat status;
	if (request_integer(request, "mode", -1) >= 0)
		return requested_mode(request, 0);
	return lstat(path, &status) == 0 && S_ISREG(status.st_mode) ? status.st_mode & 0777 : 0644;
}

static bool replace_file(struct transfer *transfer, const char *path, int64_t *size, struct failure *failure)
{
	const struct request *request = transfer->request;
	char temporary[PATH_MAX];
	int fd = create_beside(path, temporary, request->stream, failure);
	if (fd < 0)
		return false;
	bool good = receive_contents(transfer, fd, size, failure) &&
		    set_owner_and_mode(fd, requested_owner(request), replacement_mode(request, path), failure) &&
		    set_mtime(fd, request, failure);
	if (good && fsync(fd) < 0)
		good = fail_call(failure, errno, "fsync");
	if (close(fd) < 0 && good)
		good = fail_call(failure, errno, "close");
	if (good && rename(temporary, path) < 0)
		good = fail_call(failure, errno, "rename");
	if (!good)
		unlink(temporary);
	return good;
}

void files_write(struct transfer *transfer)
{
	const struct request *request = transfer->request;
	struct failure failure = {0};
	char path[PATH_MAX];
	int64_t size = 0;
	bool good = request_path(request, "path", path, &failure) &&
		    (!request_flag(request, "parents", false) ||
		     tree_make_parents(path, requested_owner(request), &failure)) &&
		    replace_file(transfer, path, &size, &failure);
	if (!good) {
		transfer_fail(transfer, &failure);
		return;
	}
	uint8_t bytes[24];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, 1);
	write_field(&map, "size", size);
	transfer_reply(transfer, &map);
}

/* stat */

static bool stat_path(const struct request *request, struct stat *status, char *target, ssize_t *length,
		      struct failure *failure)
{
	char path[PATH_MAX];
	int flags = request_flag(request, "follow", true) ? 0 : AT_SYMLINK_NOFOLLOW;
	if (!request_path(request, "path", path, failure))
		return false;
	if (fstatat(AT_FDCWD, path, status, flags) < 0)
		return fail_call(failure, errno, "stat");
	*length = S_ISLNK(status->st_mode) ? readlink(path, target, PATH_MAX) : -1;
	return true;
}

void files_stat(struct transfer *transfer)
{
	struct failure failure = {0};
	struct stat status;
	char target[PATH_MAX];
	ssize_t length = -1;
	if (!stat_path(transfer->request, &status, target, &length, &failure)) {
		transfer_fail(transfer, &failure);
		return;
	}
	uint8_t bytes[256 + PATH_MAX];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, length < 0 ? 8 : 9);
	write_type(&map, &status);
	write_field(&map, "uid", status.st_uid);
	write_field(&map, "gid", status.st_gid);
	write_field(&map, "nlink", (int64_t)status.st_nlink);
	write_field(&map, "ino", (int64_t)status.st_ino);
	write_mtime(&map, &status);
	if (length >= 0) {
		msgpack_write_string(&map, "target");
		msgpack_write_bytes(&map, target, (size_t)length);
	}
	transfer_reply(transfer, &map);
}

/* list */

struct listing {
	struct transfer *transfer;
	bool layer; /* it is an upper directory of overlayfs: tell what each entry stands for */
	size_t used;
	uint8_t bytes[MAX_DATA];
};

enum { ENTRY_ROOM = 4 + 128 + NAME_MAX };

static bool send_listing(struct listing *listing)
{
	bool sent = transfer_send(listing->transfer, listing->bytes, listing->used);
	listing->used = 0;
	return sent;
}

static bool add_entry(struct listing *listing, int directory, const char *name)
{
	struct stat status;
	if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
		return true; /* gone since readdir saw it */
	if (sizeof(listing->bytes) - listing->used < ENTRY_ROOM && !send_listing(listing))
		return false;
	uint8_t *place = listing->bytes + listing->used;
	struct msgpack_writer map = {.bytes = place + 4, .capacity = ENTRY_ROOM - 4};
	msgpack_write_map(&map, listing->layer ? 6 : 5);
	msgpack_write_string(&map, "name");
	msgpack_write_bytes(&map, name, strlen(name));
	write_type(&map, &status);
	write_mtime(&map, &status);
	if (listing->layer) {
		msgpack_write_string(&map, "mark");
		msgpack_write_string(&map, review_mark(directory, name, &status));
	}
	encode_u32(place, (uint32_t)map.length);
	listing->used += 4 + map.length;
	return true;
}

static void send_entries(struct listing *listing, DIR *entries)
{
	for (;;) {
		errno = 0;
		struct dirent *entry = readdir(entries);
		if (!entry)
			break;
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
		    !add_entry(listing, dirfd(entries), entry->d_name))
			return;
	}
	if (errno)
		transfer_abort(listing->transfer, errno);
	else if (send_listing(listing))
		transfer_end(listing->transfer);
}

void files_list(struct transfer *transfer)
{
	struct failure failure = {0};
	char path[PATH_MAX];
	DIR *entries = NULL;
	struct listing *listing = malloc(sizeof(*listing));
	if (!listing)
		fail_call(&failure, ENOMEM, "malloc");
	else if (request_path(transfer->request, "path", path, &failure) && !(entries = opendir(path)))
		fail_call(&failure, errno, "opendir");
	if (!entries) {
		transfer_fail(transfer, &failure);
	} else {
		transfer_done(transfer);
		listing->transfer = transfer;
		listing->layer = request_flag(transfer->request, "layer", false);
		listing->used = 0;
		send_entries(listing, entries);
		closedir(entries);
	}
	free(listing);
}

/* chmod, symlink, readlink */

static void answer(struct transfer *transfer, bool good, const struct failure *failure)
{
	if (good)
		transfer_done(transfer);
	else
		transfer_fail(transfer, failure);
}

/* What is at `path` itself, never what a symbolic link there leads to: the agent is root, and the path may be in a
 * directory of the user's. The descriptor is O_PATH, so that a device is not opened. */
static int open_itself(const char *path, struct stat *status, struct failure *failure)
{
	int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0) {
		fail_call(failure, errno, "open");
	} else if (fstat(fd, status) < 0) {
		fail_call(failure, errno, "fstat");
		close(fd);
		fd = -1;
	}
	return fd;
}

static bool change_mode(const struct request *request, struct failure *failure)
{
	char path[PATH_MAX], opened[32];
	struct stat status;
	if (!request_path(request, "path", path, failure))
		return false;
	int fd = open_itself(path, &status, failure);
	if (fd < 0)
		return false;
	/* fchmod refuses O_PATH (open(2)); the link in /proc leads to just what was opened. */
	snprintf(opened, sizeof(opened), "/proc/self/fd/%d", fd);
	bool good = S_ISLNK(status.st_mode) ? fail_call(failure, ELOOP, "chmod")
					    : chmod(opened, requested_mode(request, 0644)) == 0 ||
						      fail_call(failure, errno, "chmod");
	close(fd);
	return good;
}

void files_chmod(struct transfer *transfer)
{
	struct failure failure = {0};
	answer(transfer, change_mode(transfer->request, &failure), &failure);
}

static bool give_link(const char *path, struct owner owner, struct failure *failure)
{
	struct stat status;
	int fd = open_itself(path, &status, failure);
	if (fd < 0)
		return false;
	/* Only a link is given away: whoever owns the directory may have put another's file in its place. */
	bool good = !S_ISLNK(status.st_mode) ? fail_call(failure, EEXIST, "symlink")
		    : status.st_uid == owner.uid && status.st_gid == owner.gid
			    ? true
			    : fchownat(fd, "", owner.uid, owner.gid, AT_EMPTY_PATH) == 0 ||
				      fail_call(failure, errno, "fchown");
	close(fd);
	return good;
}

static bool make_link(const struct request *request, struct failure *failure)
{
	char path[PATH_MAX], target[PATH_MAX];
	if (!request_path(request, "path", path, failure) || !request_path(request, "target", target, failure))
		return false;
	if (symlink(target, path) < 0)
		return fail_call(failure, errno, "symlink");
	return give_link(path, requested_owner(request), failure);
}

void files_symlink(struct transfer *transfer)
{
	struct failure failure = {0};
	answer(transfer, make_link(transfer->request, &failure), &failure);
}

void files_readlink(struct transfer *transfer)
{
	struct failure failure = {0};
	char path[PATH_MAX], target[PATH_MAX];
	ssize_t length = -1;
	if (request_path(transfer->request, "path", path, &failure) &&
	    (length = readlink(path, target, sizeof(target))) < 0)
		fail_call(&failure, errno, "readlink");
	if (length < 0) {
		transfer_fail(transfer, &failure);
		return;
	}
	uint8_t bytes[32 + PATH_MAX];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, 1);
	msgpack_write_string(&map, "target");
	msgpack_write_bytes(&map, target, (size_t)length);
	transfer_reply(transfer, &map);
}

/* mkdir, rename, remove */

static bool make_directory(const struct request *request, struct failure *failure)
{
	char path[PATH_MAX];
	struct stat status;
	struct owner owner = requested_owner(request);
	bool parents = request_flag(request, "parents", false);
	if (!request_path(request, "path", path, failure))
		return false;
	if (parents && !tree_make_parents(path, owner, failure))
		return false;
	if (tree_make_directory(path, requested_mode(request, 0755), owner, failure))
		return true;
	return parents && failure->error == EEXIST && stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

void files_mkdir(struct transfer *transfer)
{
	struct failure failure = {0};
	answer(transfer, make_directory(transfer->request, &failure), &failure);
}

static bool rename_path(const struct request *request, struct failure *failure)
{
	char from[PATH_MAX], to[PATH_MAX];
	unsigned flags = request_flag(request, "replace", true) ? 0 : RENAME_KEEP_TARGET;
	if (!request_path(request, "path", from, failure) || !request_path(request, "to", to, failure))
		return false;
	return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags) == 0 || fail_call(failure, errno, "rename");
}

void files_rename(struct transfer *transfer)
{
	struct failure failure = {0};
	answer(transfer, rename_path(transfer->request, &failure), &failure);
}

static bool remove_path(const struct request *request, struct failure *failure)
{
	char path[PATH_MAX];
	struct stat status;
	if (!request_path(request, "path", path, failure))
		return false;
	if (lstat(path, &status) < 0) {
		if (errno == ENOENT && request_flag(request, "missing_ok", false))
			return true;
		return fail_call(failure, errno, "stat");
	}
	if (!S_ISDIR(status.st_mode))
		return unlink(path) == 0 || fail_call(failure, errno, "unlink");
	if (request_flag(request, "recursive", false))
		return tree_remove(path, failure);
	return rmdir(path) == 0 || fail_call(failure, errno, "rmdir");
}

void files_remove(struct transfer *transfer)
{
	struct failure failure = {0};
	answer(transfer, remove_path(transfer->request, &failure), &failure);
}
