/* The FUSE pump (docs/protocol-control.md, The fs port; linux/fuse.h). For each mount a reader takes requests to the port and a
 * notifier takes notifications to the kernel; one thread takes all answers from the port to the kernel.
 *
 * Notifications have a thread of their own because the kernel may hold them back for a lock that is only released by an answer
 * (FUSE_NOTIFY_INVAL_ENTRY takes the directory's lock, FUSE_NOTIFY_STORE a page's): answers must never wait behind one.
 */
#include "fusepump.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "kernel.h"
#include "log.h"
#include "review.h"
#include "tree.h"

/* INIT offers 128 KiB; larger reads would arrive in pieces of twice that. */
#define READ_AHEAD_KB "1024"
/* Pushed contents beyond this are dropped: they are a favour, and the kernel asks for what it lacks. */
enum { MAX_WAITING_STORES = 8 * 1024 * 1024 };
/* How long a FORGET waits for company. The host may keep an unlinked file's space for so long. */
enum { LATEST_FORGET_MS = 20 };

struct notification {
	struct notification *next;
	size_t length;
	uint8_t message[];
};

struct fuse_mount {
	struct fuse_mount *next;
	uint32_t id;
	int fd, users; /* the table and each thread that holds it; under `mounts_lock` */
	bool file; /* its root is a regular file, not a directory */
	char path[PATH_MAX]; /* where the host's files are */
	char layer[PATH_MAX], view[PATH_MAX]; /* of a review mount: its directory, and where programs see it; else empty */

	pthread_mutex_t lock;
	pthread_cond_t news;
	bool gone;
	size_t waiting;
	struct notification *first, **last;
};

static struct port fs_port;
static struct loop fs_loop;
static pthread_mutex_t mounts_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fuse_mount *mounts;

/* The table. */

static struct fuse_mount *mount_get(uint32_t id)
{
	pthread_mutex_lock(&mounts_lock);
	struct fuse_mount *mount = mounts;
	while (mount && mount->id != id)
		mount = mount->next;
	if (mount)
		mount->users++;
	pthread_mutex_unlock(&mounts_lock);
	return mount;
}

static void mount_hold(struct fuse_mount *mount)
{
	pthread_mutex_lock(&mounts_lock);
	mount->users++;
	pthread_mutex_unlock(&mounts_lock);
}

static void mount_put(struct fuse_mount *mount)
{
	pthread_mutex_lock(&mounts_lock);
	bool last = --mount->users == 0;
	pthread_mutex_unlock(&mounts_lock);
	if (!last)
		return;
	close(mount->fd);
	while (mount->first) {
		struct notification *notification = mount->first;
		mount->first = notification->next;
		free(notification);
	}
	free(mount);
}

static bool mount_enter(struct fuse_mount *mount, struct failure *failure)
{
	pthread_mutex_lock(&mounts_lock);
	struct fuse_mount *other = mounts;
	while (other && other->id != mount->id)
		other = other->next;
	if (!other) {
		mount->next = mounts;
		mounts = mount;
		mount->users++;
	}
	pthread_mutex_unlock(&mounts_lock);
	return !other || fail_call(failure, EEXIST, "id");
}

/* No more requests will come, or none ever came. */
static void mount_end(struct fuse_mount *mount)
{
	bool listed = false;
	pthread_mutex_lock(&mounts_lock);
	for (struct fuse_mount **link = &mounts; *link; link = &(*link)->next)
		if (*link == mount) {
			*link = mount->next;
			listed = true;
			break;
		}
	pthread_mutex_unlock(&mounts_lock);
	pthread_mutex_lock(&mount->lock);
	mount->gone = true;
	pthread_cond_signal(&mount->news);
	pthread_mutex_unlock(&mount->lock);
	if (listed)
		mount_put(mount);
}

/* Requests: kernel to host. */

/* Nobody waits for one: it goes along with the request that follows, which spares the host and us a wake-up. */
static bool is_forget(const struct fuse_question *question)
{
	return question->opcode == FUSE_OPCODE_FORGET || question->opcode == FUSE_OPCODE_BATCH_FORGET;
}

/* The errno of what every host refuses, or 0. The kernel asks again and again: each first write to a file for security.capability,
 * each open() of Python whether the file is a terminal. `message` ends with a NUL where a name is due. */
static int refusal(const struct fuse_question *question, const uint8_t *message, size_t length)
{
	const size_t name = sizeof(*question) + sizeof(struct fuse_attribute_question);
	if (question->opcode == FUSE_OPCODE_IOCTL)
		return ENOSYS; /* the caller gets ENOTTY */
	if (question->opcode != FUSE_OPCODE_GETXATTR || length <= name)
		return 0;
	const char *attribute = (const char *)message + name;
	bool foreign = strncmp(attribute, "security.", 9) == 0 || strncmp(attribute, "system.", 7) == 0;
	return foreign ? EOPNOTSUPP : 0;
}

static bool refused_here(const struct fuse_mount *mount, const struct fuse_question *question, int error)
{
	struct fuse_answer answer = {.length = sizeof(answer), .error = -error, .unique = question->unique};
	return error && write(mount->fd, &answer, sizeof(answer)) == sizeof(answer);
}

/* Returns whether the message is left in the ring for now. */
static bool take_request(const struct fuse_mount *mount, const uint8_t *message, size_t length, bool late)
{
	struct fuse_question question;
	memcpy(&question, message, sizeof(question)); /* the kernel sends no less */
	if (refused_here(mount, &question, refusal(&question, message, length)))
		return late;
	late = is_forget(&question);
	(late ? port_send_late : port_send_wait)(&fs_port, FRAME_FUSE, 0, mount->id, message, length);
	return late;
}

static void *read_requests(void *argument)
{
	struct fuse_mount *mount = argument;
	struct pollfd requests = {.fd = mount->fd, .events = POLLIN};
	bool late = false;
	uint8_t *message = malloc(MAX_PAYLOAD);
	if (!message)
		fatal("allocate the buffer of mount %u: out of memory", mount->id);
	for (;;) {
		if (late && poll(&requests, 1, LATEST_FORGET_MS) == 0) {
			port_flush(&fs_port);
			late = false;
		}
		ssize_t length = read(mount->fd, message, MAX_PAYLOAD);
		if (length > 0)
			late = take_request(mount, message, (size_t)length, late);
		else if (errno != EINTR && errno != EAGAIN && errno != ENOENT) /* ENOENT: interrupted meanwhile */
			break;
	}
	if (errno != ENODEV)
		say("read requests of the mount on %s: %s", mount->path, strerror(errno));
	free(message);
	mount_end(mount);
	mount_put(mount);
	return NULL;
}

/* Notifications: host to kernel. */

static void *write_notifications(void *argument)
{
	struct fuse_mount *mount = argument;
	pthread_mutex_lock(&mount->lock);
	while (!mount->gone) {
		struct notification *notification = mount->first;
		if (!notification) {
			pthread_cond_wait(&mount->news, &mount->lock);
			continue;
		}
		mount->first = notification->next;
		if (!mount->first)
			mount->last = &mount->first;
		mount->waiting -= notification->length;
		pthread_mutex_unlock(&mount->lock);
		ssize_t written = write(mount->fd, notification->message, notification->length);
		(void)written; /* ENOENT: the kernel does not know the node, and so has nothing old of it */
		free(notification);
		pthread_mutex_lock(&mount->lock);
	}
	pthread_mutex_unlock(&mount->lock);
	mount_put(mount);
	return NULL;
}

static void queue_notification(struct fuse_mount *mount, const struct frame *frame, bool store)
{
	pthread_mutex_lock(&mount->lock);
	if (!store || mount->waiting + frame->length <= MAX_WAITING_STORES) {
		struct notification *notification = malloc(sizeof(*notification) + frame->length);
		if (!notification)
			fatal("keep a notification of mount %u: out of memory", mount->id);
		notification->next = NULL;
		notification->length = frame->length;
		memcpy(notification->message, frame->payload, frame->length);
		*mount->last = notification;
		mount->last = &notification->next;
		mount->waiting += frame->length;
		pthread_cond_signal(&mount->news);
	}
	pthread_mutex_unlock(&mount->lock);
}

/* Answers: host to kernel. */

static void take_message(const struct frame *frame)
{
	struct fuse_answer head;
	memcpy(&head, frame->payload, sizeof(head));
	if (head.length != frame->length)
		fatal("protocol error on port %s: a FUSE message of %u bytes in a frame of %u", fs_port.name, head.length,
		      frame->length);
	struct fuse_mount *mount = mount_get(frame->stream);
	if (!mount)
		return; /* unmounted a moment ago */
	if (!head.unique)
		queue_notification(mount, frame, head.error == FUSE_NOTIFY_CODE_STORE);
	else if (write(mount->fd, frame->payload, frame->length) < 0 && errno == EINVAL)
		say("the kernel refuses an answer of %u bytes for %s", frame->length, mount->path);
	mount_put(mount);
}

static void take_frame(const struct frame *frame)
{
	switch (frame->type) {
	case FRAME_FUSE: take_message(frame); break;
	case FRAME_QUIESCE: port_hold(&fs_port); break;
	case FRAME_RESUME: port_release(&fs_port); break;
	default: fatal("protocol error on port %s: frame type %u", fs_port.name, frame->type);
	}
}

static void *serve(void *unused)
{
	(void)unused;
	loop_run(&fs_loop);
}

void fusepump_start(int fd)
{
	port_init(&fs_port, PORT_FS, fd, MAX_PAYLOAD);
	loop_init(&fs_loop, NULL);
	port_attach(&fs_port, &fs_loop, take_frame, NULL);
	int error = thread_start(serve, NULL);
	if (error)
		fatal("start the thread of port %s: %s", fs_port.name, strerror(error));
}

/* Operations. */

static bool read_places(struct fuse_mount *mount, const struct request *request, struct failure *failure)
{
	struct msgpack_value layer;
	if (!request_find(request, "layer", &layer) || layer.type != MSGPACK_BYTES)
		return request_path(request, "path", mount->path, failure);
	return request_path(request, "path", mount->view, failure) && request_path(request, "layer", mount->layer, failure) &&
	       review_lower(mount->layer, mount->path, failure);
}

static struct fuse_mount *mount_new(const struct request *request, struct failure *failure)
{
	struct fuse_mount *mount = calloc(1, sizeof(*mount));
	int64_t id = request_integer(request, "id", -1);
	if (!mount || id < 0 || id > UINT32_MAX) {
		fail_call(failure, mount ? EINVAL : ENOMEM, mount ? "id" : "malloc");
		free(mount);
		return NULL;
	}
	mount->id = (uint32_t)id;
	mount->file = request_flag(request, "file", false);
	mount->users = 1;
	mount->last = &mount->first;
	pthread_mutex_init(&mount->lock, NULL);
	pthread_cond_init(&mount->news, NULL);
	mount->fd = -1;
	if (read_places(mount, request, failure)) {
		mount->fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
		if (mount->fd >= 0)
			return mount;
		fail_call(failure, errno, "open /dev/fuse");
	}
	free(mount);
	return NULL;
}

static bool make_file(const char *path, struct failure *failure)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0)
		return fail_call(failure, errno, "open");
	close(fd);
	return true;
}

static bool make_mount_point(const char *path, bool file, struct failure *failure)
{
	struct stat status;
	const struct owner root = {0, 0};
	if (stat(path, &status) == 0)
		return S_ISDIR(status.st_mode) == !file || fail_call(failure, file ? EISDIR : ENOTDIR, "path");
	return tree_make_parents(path, root, failure) &&
	       (file ? make_file(path, failure) : tree_make_directory(path, 0755, root, failure));
}

static bool attach(const struct fuse_mount *new, bool readonly, struct failure *failure)
{
	char options[128];
	unsigned long flags = MS_NOSUID | MS_NODEV | (readonly ? MS_RDONLY : 0);
	snprintf(options, sizeof(options),
		 "fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other,default_permissions", new->fd,
		 new->file ? S_IFREG : S_IFDIR);
	return mount("taskvm", new->path, "fuse", flags, options) == 0 || fail_call(failure, errno, "mount");
}

/* The first answer proves that INIT was agreed; only then does the kernel know its read-ahead. */
static bool prove(const struct fuse_mount *mount, struct failure *failure)
{
	struct stat status;
	char path[96];
	if (stat(mount->path, &status) < 0)
		return fail_call(failure, errno, "stat");
	snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb", major(status.st_dev), minor(status.st_dev));
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, READ_AHEAD_KB, strlen(READ_AHEAD_KB)) < 0)
		say("write %s: %s", path, strerror(errno)); /* slower, not wrong */
	if (fd >= 0)
		close(fd);
	return true;
}

static void answer(struct transfer *transfer, bool good, const struct failure *failure)
{
	if (good)
		transfer_done(transfer);
	else
		transfer_fail(transfer, failure);
}

static bool start_thread(struct fuse_mount *mount, void *(*run)(void *), struct failure *failure)
{
	mount_hold(mount);
	int error = thread_start(run, mount);
	if (!error)
		return true;
	mount_put(mount);
	return fail_call(failure, error, "pthread_create");
}

static bool cover(const struct fuse_mount *mount, struct failure *failure)
{
	return !mount->layer[0] ||
	       (make_mount_point(mount->view, false, failure) && review_cover(mount->layer, mount->view, failure));
}

/* The reader begins after mount(2): before it, /dev/fuse belongs to no file system. */
static bool bring_up(struct fuse_mount *mount, bool readonly, struct failure *failure)
{
	if (!make_mount_point(mount->path, mount->file, failure) || !mount_enter(mount, failure))
		return false;
	bool attached = attach(mount, readonly, failure);
	if (attached && start_thread(mount, write_notifications, failure) &&
	    start_thread(mount, read_requests, failure) && prove(mount, failure) && cover(mount, failure))
		return true;
	mount_end(mount);
	if (attached)
		umount2(mount->path, MNT_DETACH);
	return false;
}

void fusepump_mount(struct transfer *transfer)
{
	struct failure failure = {0};
	struct fuse_mount *mount = mount_new(transfer->request, &failure);
	bool good = mount && bring_up(mount, request_flag(transfer->request, "readonly", false), &failure);
	if (mount)
		mount_put(mount);
	answer(transfer, good, &failure);
}

static struct fuse_mount *requested_mount(const struct request *request, struct failure *failure)
{
	int64_t id = request_integer(request, "id", -1);
	struct fuse_mount *mount = id < 0 || id > UINT32_MAX ? NULL : mount_get((uint32_t)id);
	if (!mount)
		fail_call(failure, ENOENT, "id");
	return mount;
}

void fusepump_unmount(struct transfer *transfer)
{
	struct failure failure = {0};
	struct fuse_mount *mount = requested_mount(transfer->request, &failure);
	bool good = mount && (!mount->layer[0] || review_uncover(mount->view, &failure));
	if (good && umount2(mount->path, UMOUNT_NOFOLLOW) < 0)
		good = fail_call(&failure, errno, "umount");
	if (mount)
		mount_put(mount);
	answer(transfer, good, &failure);
}

void fusepump_renew(struct transfer *transfer)
{
	struct failure failure = {0};
	struct fuse_mount *mount = requested_mount(transfer->request, &failure);
	bool good = mount && (mount->layer[0] ? review_renew(mount->layer, mount->view, &failure)
					      : fail_call(&failure, EINVAL, "id"));
	if (mount)
		mount_put(mount);
	answer(transfer, good, &failure);
}
