/* The control port's loop: which stream a frame is for, which operation an OPEN asks for, and how the guest comes to rest. */
#include "control.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "cgroup.h"
#include "exec.h"
#include "files.h"
#include "fusepump.h"
#include "grow.h"
#include "identity.h"
#include "kernel.h"
#include "log.h"
#include "pool.h"
#include "review.h"
#include "watch.h"

#ifndef AGENT_VERSION
#define AGENT_VERSION "0"
#endif

enum { MAX_FILE_OPERATIONS = 32, MAX_MOUNT_OPERATIONS = 4, MAX_WATCHES = 16, BUCKETS = 256 };
/* A process that waits in the kernel for a file system freezes only when that answers. It runs nothing of the user's before it is
 * thawed, so after this time the guest is as good as at rest. */
enum { FREEZE_SECONDS = 2 };
/* How long poweroff waits for one killed process after another. */
enum { LAST_WORDS_MS = 1000 };

struct port control_port;
struct loop control_loop;

static struct stream *streams[BUCKETS];
static struct pool file_pool, mount_pool, identity_pool, sync_pool, watch_pool;
static struct source freeze_source, deadline_source;
static int freeze_events = -1, deadline = -1;
static bool freezing;

/* Streams. */

static struct stream **stream_place(uint32_t id)
{
	struct stream **link = &streams[id % BUCKETS];
	while (*link && (*link)->id != id)
		link = &(*link)->next;
	return link;
}

void stream_add(struct stream *stream)
{
	struct stream **head = &streams[stream->id % BUCKETS];
	stream->next = *head;
	*head = stream;
}

void stream_remove(struct stream *stream)
{
	struct stream **link = stream_place(stream->id);
	if (*link == stream)
		*link = stream->next;
}

/* Replies. */

void reply_map(uint32_t stream, const struct msgpack_writer *map)
{
	port_send(&control_port, FRAME_REPLY, 0, stream, map->bytes, map->length);
}

void reply_done(uint32_t stream)
{
	static const uint8_t EMPTY_MAP = 0x80;
	port_send_urgent(&control_port, FRAME_REPLY, 0, stream, &EMPTY_MAP, 1);
}

void write_failure(struct msgpack_writer *map, const struct failure *failure)
{
	msgpack_write_map(map, 2);
	msgpack_write_string(map, "errno");
	msgpack_write_integer(map, failure->error);
	msgpack_write_string(map, "call");
	msgpack_write_string(map, failure->call ? failure->call : "");
}

void reply_failure(uint32_t stream, const struct failure *failure)
{
	uint8_t bytes[128];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	write_failure(&map, failure);
	reply_map(stream, &map);
}

void send_u32(uint8_t type, uint8_t channel, uint32_t stream, uint32_t value)
{
	uint8_t bytes[4];
	encode_u32(bytes, value);
	port_send(&control_port, type, channel, stream, bytes, sizeof(bytes));
}

_Noreturn void protocol_error(const struct frame *frame, const char *reason)
{
	fatal("protocol error on port %s: %s (type %u, stream %u, channel %u, %u bytes)", control_port.name, reason,
	      frame->type, frame->stream, frame->channel, frame->length);
}

/* Operations. */

static void sync_disks(struct transfer *transfer)
{
	sync();
	transfer_done(transfer);
}

/* A guest that ends by poweroff leaves a clean root file system: nothing writes any more, then it is made read-only. */
static void turn_off(struct transfer *transfer)
{
	transfer_done(transfer);
	cgroup_kill_all();
	struct pollfd events = {.fd = cgroup_open_events(-1), .events = POLLPRI};
	while (!cgroup_event(events.fd, "populated 0"))
		if (poll(&events, 1, LAST_WORDS_MS) <= 0)
			break;
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0) {
		say("remount / read-only: %s", strerror(errno));
		sync();
	}
	power_off();
}

/* Pools of their own: file operations may all wait for the port, which is held while `identity` and `sync` are answered; a watch
 * lasts, and would keep a place that file operations wait for; and file operations on a mount whose provider hangs keep their
 * places until the host gives it up, while other mounts come and go and the guest ends. */
static const struct operation {
	const char *name;
	void (*run)(struct transfer *transfer);
	struct pool *pool;
	bool urgent;
} OPERATIONS[] = {
	{"read", files_read, &file_pool, false},
	{"write", files_write, &file_pool, false},
	{"stat", files_stat, &file_pool, false},
	{"list", files_list, &file_pool, false},
	{"mkdir", files_mkdir, &file_pool, false},
	{"rename", files_rename, &file_pool, false},
	{"remove", files_remove, &file_pool, false},
	{"chmod", files_chmod, &file_pool, false},
	{"symlink", files_symlink, &file_pool, false},
	{"readlink", files_readlink, &file_pool, false},
	{"mount", fusepump_mount, &mount_pool, false},
	{"unmount", fusepump_unmount, &mount_pool, false},
	{"renew", fusepump_renew, &mount_pool, false},
	{"settle", review_settle, &mount_pool, false},
	{"poweroff", turn_off, &identity_pool, false},
	{"watch", watch_run, &watch_pool, false},
	{"grow", grow_root, &file_pool, false},
	{"sync", sync_disks, &sync_pool, true},
	{"identity", identity_take, &identity_pool, true},
};

static bool is_named(const struct msgpack_value *value, const char *name)
{
	return value->length == strlen(name) && !memcmp(value->bytes, name, value->length);
}

static void open_operation(struct request *request, const struct msgpack_value *name)
{
	if (is_named(name, "exec")) {
		exec_open(request);
		return;
	}
	for (const struct operation *each = OPERATIONS; each < OPERATIONS + ARRAY_SIZE(OPERATIONS); each++)
		if (is_named(name, each->name)) {
			transfer_open(request, each->pool, each->run, each->urgent);
			return;
		}
	reply_failure(request->stream, &(struct failure){ENOSYS, "op"});
	free(request);
}

static void take_open(const struct frame *frame)
{
	struct msgpack_value name;
	if (frame->stream & GUEST_STREAM_BIT || *stream_place(frame->stream))
		protocol_error(frame, "OPEN of a stream that is not free");
	if (!msgpack_valid(frame->payload, frame->length) ||
	    !msgpack_find(frame->payload, frame->length, "op", &name) || name.type != MSGPACK_BYTES)
		protocol_error(frame, "OPEN without a map that names an operation");
	if (is_named(&name, "ping")) {
		reply_done(frame->stream);
		return;
	}
	struct request *request = request_copy(frame);
	if (!request)
		fatal("keep a request of %u bytes: out of memory", frame->length);
	open_operation(request, &name);
}

/* Rest. */

static void rest(void)
{
	const struct itimerspec never = {0};
	if (!freezing)
		return;
	freezing = false;
	timerfd_settime(deadline, 0, &never, NULL);
	port_hold(&control_port);
}

static void freeze_ready(struct source *source, uint32_t events)
{
	(void)source, (void)events;
	if (cgroup_event(freeze_events, "frozen 1"))
		rest();
}

static void deadline_ready(struct source *source, uint32_t events)
{
	(void)source, (void)events;
	uint64_t times;
	if (read(deadline, &times, sizeof(times)) > 0 && freezing) {
		say("a process still waits for a file system; it will stop before it runs on");
		rest();
	}
}

static void come_to_rest(void)
{
	const struct itimerspec soon = {.it_value.tv_sec = FREEZE_SECONDS};
	freezing = true;
	timerfd_settime(deadline, 0, &soon, NULL);
	cgroup_prepare();
	cgroup_freeze_all(true);
	freeze_ready(NULL, 0);
}

static void go_on(void)
{
	rest(); /* each QUIESCE has its QUIESCED, also one that the host gave up on */
	cgroup_freeze_all(false);
	port_release(&control_port);
}

/* Frames. */

static void take_port_frame(const struct frame *frame)
{
	switch (frame->type) {
	case FRAME_QUIESCE: come_to_rest(); break;
	case FRAME_RESUME: go_on(); break;
	default: protocol_error(frame, "no frame for the port itself");
	}
}

static void take_frame(const struct frame *frame)
{
	if (frame->stream == 0) {
		take_port_frame(frame);
	} else if (frame->type == FRAME_OPEN) {
		take_open(frame);
	} else {
		struct stream *stream = *stream_place(frame->stream);
		if (stream) /* else it ended while the frame was under way */
			stream->take(stream, frame);
	}
}

static void say_hello(const char *kernel)
{
	uint8_t bytes[512];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, 4);
	msgpack_write_string(&map, "version");
	msgpack_write_string(&map, AGENT_VERSION);
	msgpack_write_string(&map, "protocol");
	msgpack_write_integer(&map, PROTOCOL_VERSION);
	msgpack_write_string(&map, "arch");
#if defined(__x86_64__)
	msgpack_write_string(&map, "x86_64");
#else
	msgpack_write_string(&map, "aarch64");
#endif
	msgpack_write_string(&map, "kernel");
	msgpack_write_string(&map, kernel);
	port_send(&control_port, FRAME_HELLO, 0, 0, map.bytes, map.length);
}

_Noreturn void control_run(int fd, const char *kernel)
{
	loop_init(&control_loop, exec_settle);
	port_init(&control_port, PORT_CONTROL, fd, MAX_MAP);
	pool_deliver_to(&control_loop);
	pool_init(&file_pool, MAX_FILE_OPERATIONS);
	pool_init(&mount_pool, MAX_MOUNT_OPERATIONS);
	pool_init(&identity_pool, 1);
	pool_init(&sync_pool, 1);
	pool_init(&watch_pool, MAX_WATCHES);
	exec_init();
	freeze_events = cgroup_open_events(-1);
	deadline = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (freeze_events < 0 || deadline < 0)
		fatal("open cgroup.events and a timer: %s", strerror(errno));
	freeze_source.ready = freeze_ready;
	deadline_source.ready = deadline_ready;
	loop_add(&control_loop, freeze_events, &freeze_source, EPOLLPRI);
	loop_add(&control_loop, deadline, &deadline_source, EPOLLIN);
	say_hello(kernel);
	port_attach(&control_port, &control_loop, take_frame, exec_resume);
	loop_run(&control_loop);
}
