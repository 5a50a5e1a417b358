/* The control thread whole, in a process of its own, and a host that breaks its frames: `fuzz_control [ROUNDS [SEED]]`.
 *
 * Real are the port, the dispatch of frames, the streams with their credit, and programs' pipes and terminals. What would do
 * something to this machine is replaced below: operations only read their fields and move bytes, a program is a copy of this
 * process that echoes or ends. The agent may refuse a session by `fatal`; a sanitizer's report, a crash or a hang is a failure. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../accounting.h"
#include "../cgroup.h"
#include "../control.h"
#include "../files.h"
#include "../fusepump.h"
#include "../grow.h"
#include "../identity.h"
#include "../kernel.h"
#include "../log.h"
#include "../program.h"
#include "../pty.h"
#include "../review.h"
#include "../spawn.h"
#include "../watch.h"
#include "check.h"
#include "random.h"

enum { REFUSED = 3, NOBODY = 65534, HANG_MS = 100000, LAST_STREAM = 0x7001 };

/* Instead of what reaches this machine. The linker takes these before libc's and cgroup.c's own. */

int kill(pid_t pid, int signal)
{
	CHECK(pid < -1 && signal >= 0 && signal <= SIGRTMAX); /* a program's group, never everybody or ourselves */
	return 0;
}

int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data)
{
	(void)source, (void)target, (void)type, (void)flags, (void)data;
	return -1;
}

void say(const char *format, ...)
{
	(void)format;
}

_Noreturn void fatal(const char *format, ...)
{
	(void)format;
	_exit(REFUSED);
}

_Noreturn void power_off(void)
{
	_exit(REFUSED);
}

int cgroup_make(uint32_t stream)
{
	(void)stream;
	return eventfd(0, EFD_CLOEXEC);
}

bool cgroup_write(int group, const char *file, const char *text)
{
	return group >= 0 && *file && *text;
}

void cgroup_read(int group, const char *file, char *text, size_t size)
{
	CHECK(group >= 0 && *file && size > 0);
	*text = 0;
}

bool cgroup_remove(uint32_t stream)
{
	return stream % 2; /* the others' children live on */
}

void cgroup_kill(int group)
{
	CHECK(group >= 0);
}

void cgroup_signal_group(int group, pid_t leader, int signal)
{
	CHECK(group >= 0 && leader > 1 && signal >= 0 && signal <= SIGRTMAX);
}

int cgroup_open_events(int group)
{
	(void)group;
	return eventfd(0, EFD_CLOEXEC);
}

bool cgroup_event(int events, const char *line)
{
	return events >= 0 && *line;
}

void cgroup_freeze_all(bool freeze)
{
	(void)freeze;
}

void cgroup_kill_all(void)
{
}

/* Instead of the operations. */

static bool read_fields(struct transfer *transfer)
{
	struct failure failure = {0};
	char path[PATH_MAX];
	request_integer(transfer->request, "a", 0);
	if (request_path(transfer->request, "path", path, &failure))
		return true;
	transfer_fail(transfer, &failure);
	return false;
}

static void read_something(struct transfer *transfer)
{
	static const uint8_t BYTES[5 * MAX_DATA]; /* more than the first credit: it waits, and takes no input meanwhile */
	if (!read_fields(transfer))
		return;
	transfer_done(transfer);
	if (transfer_send(transfer, BYTES, sizeof(BYTES)))
		transfer_end(transfer);
}

static void write_something(struct transfer *transfer)
{
	uint8_t bytes[1000];
	ssize_t count;
	if (!read_fields(transfer))
		return;
	while ((count = transfer_receive(transfer, bytes, sizeof(bytes))) > 0)
		continue;
	if (count == 0)
		transfer_done(transfer);
}

static void wait_for_reset(struct transfer *transfer)
{
	struct pollfd wake = {.fd = transfer_wake(transfer), .events = POLLIN};
	if (!read_fields(transfer))
		return;
	transfer_done(transfer);
	poll(&wake, 1, -1);
	transfer_abort(transfer, ECANCELED);
}

static void do_nothing(struct transfer *transfer)
{
	if (read_fields(transfer))
		transfer_done(transfer);
}

#define REPLACE(name, by) void name(struct transfer *transfer) { by(transfer); }
REPLACE(files_read, read_something)
REPLACE(files_list, read_something)
REPLACE(files_write, write_something)
REPLACE(watch_run, wait_for_reset)
REPLACE(files_stat, do_nothing)
REPLACE(files_chmod, do_nothing)
REPLACE(files_symlink, do_nothing)
REPLACE(files_readlink, do_nothing)
REPLACE(files_mkdir, do_nothing)
REPLACE(files_rename, do_nothing)
REPLACE(files_remove, do_nothing)
REPLACE(fusepump_mount, do_nothing)
REPLACE(fusepump_unmount, do_nothing)
REPLACE(fusepump_renew, do_nothing)
REPLACE(review_settle, do_nothing)
REPLACE(grow_root, do_nothing)
REPLACE(identity_take, do_nothing)

/* Instead of spawn.c: the request is read as there, and the program is this one. */

static bool open_terminal(struct spawn *spawn, const uint8_t *map, size_t length, int *theirs)
{
	struct winsize size;
	if (!pty_read_size(map, length, &size))
		return fail_call(&spawn->failure, EINVAL, "pty");
	spawn->out = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (spawn->out < 0 || unlockpt(spawn->out) < 0)
		return fail_call(&spawn->failure, errno, "posix_openpt");
	*theirs = open(ptsname(spawn->out), O_RDWR | O_NOCTTY | O_CLOEXEC);
	spawn->in = fcntl(spawn->out, F_DUPFD_CLOEXEC, 3);
	spawn->tty = true;
	return *theirs >= 0 || fail_call(&spawn->failure, errno, "open of a terminal");
}

static bool open_pipes(struct spawn *spawn, int theirs[3])
{
	int in[2], out[2], err[2];
	CHECK(!pipe2(in, O_CLOEXEC) && !pipe2(out, O_CLOEXEC) && !pipe2(err, O_CLOEXEC));
	theirs[0] = in[0], theirs[1] = out[1], theirs[2] = err[1];
	spawn->in = in[1], spawn->out = out[0], spawn->err = err[0];
	CHECK(!fcntl(in[1], F_SETFL, O_NONBLOCK) && !fcntl(out[0], F_SETFL, O_NONBLOCK) && !fcntl(err[0], F_SETFL, O_NONBLOCK));
	return true;
}

/* Descriptors are as after execve: one of the port that lived on would hide the agent's end. */
static _Noreturn void be_program(const char *name, int in, int out)
{
	char bytes[4096];
	ssize_t count;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	CHECK(dup2(in, 0) == 0 && dup2(out, 1) == 1 && !syscall(SYSCALL_CLOSE_RANGE, 3, ~0u, 0));
	setsid();
	while (name[0] == 'c' && (count = read(0, bytes, sizeof(bytes))) > 0)
		if (write(1, bytes, (size_t)count) < 0)
			break;
	_exit(name[0]);
}

static bool start(struct spawn *spawn, struct program *program, int theirs[3])
{
	size_t length;
	const uint8_t *terminal = request_map(spawn->request, "pty", &length);
	if (!program_read(program, spawn->request, &spawn->failure))
		return false;
	if (terminal ? !open_terminal(spawn, terminal, length, theirs) : !open_pipes(spawn, theirs))
		return false;
	spawn->cgroup = cgroup_make(spawn->request->stream);
	if (!accounting_limit(spawn->cgroup, spawn->request, &spawn->failure))
		return false;
	/* As spawn.c does: its number is known before it runs, since the control thread may see its end before this returns. */
	long pid = syscall(SYS_clone, CLONE_PARENT_SETTID | SIGCHLD, 0, &spawn->pid, 0, 0);
	CHECK(pid >= 0);
	if (!pid)
		be_program(program->argv[0], theirs[0], terminal ? theirs[0] : theirs[1]);
	return true;
}

static void run_job(struct job *job)
{
	struct spawn *spawn = container_of(job, struct spawn, job);
	struct program *program = malloc(sizeof(*program));
	int theirs[3] = {-1, -1, -1};
	CHECK(program);
	if (!start(spawn, program, theirs)) {
		int *const OURS[] = {&spawn->in, &spawn->out, &spawn->err, &spawn->cgroup};
		for (size_t i = 0; i < ARRAY_SIZE(OURS); i++) {
			close(*OURS[i]);
			*OURS[i] = -1;
		}
	}
	for (size_t i = 0; i < ARRAY_SIZE(theirs); i++)
		close(theirs[i]);
	program_free(program);
	free(program);
}

void spawn_init(struct spawn *spawn, struct request *request)
{
	*spawn = (struct spawn){.request = request, .in = -1, .out = -1, .err = -1, .cgroup = -1};
	spawn->job.run = run_job;
}

void spawn_free(struct spawn *spawn)
{
	free(spawn->request);
}

/* The agent, with no right that could hurt whatever is not replaced above. */
static _Noreturn void be_agent(int fd)
{
	sigset_t children;
	if (!getuid())
		CHECK(!setgroups(0, NULL) && !setgid(NOBODY) && !setuid(NOBODY));
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* after setuid, which forgets it */
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	sigprocmask(SIG_BLOCK, &children, NULL);
	CHECK(!fcntl(fd, F_SETFL, O_NONBLOCK));
	control_run(fd, "6.1");
}

/* The host. */

static int port;
static long refusals, replies, exits;
static bool last_exit; /* of the program that is run last */
static uint32_t last_opened;
static struct { bool exec, ended; } opened[128]; /* by stream: what the protocol allows to be sent on it */
static struct decoder decoder;
static uint8_t answers[HEADER_SIZE + MAX_MAP];

/* Take what has come. False at the agent's end. */
static bool take_answers(void)
{
	size_t room;
	uint8_t *space = decoder_space(&decoder, &room);
	ssize_t count = recv(port, space, room, MSG_DONTWAIT);
	if (count < 0)
		return errno == EAGAIN || errno == EINTR;
	if (count == 0)
		return false;
	decoder_filled(&decoder, (size_t)count);
	struct frame frame;
	enum decoder_result result;
	while ((result = decoder_next(&decoder, &frame)) == FRAME_READY) {
		bool map = frame.type == FRAME_HELLO || frame.type == FRAME_REPLY || frame.type == FRAME_EXIT;
		CHECK(!map || msgpack_valid(frame.payload, frame.length));
		replies += frame.type == FRAME_REPLY;
		exits += frame.type == FRAME_EXIT;
		last_exit = last_exit || (frame.type == FRAME_EXIT && frame.stream == LAST_STREAM);
	}
	CHECK(result == FRAME_MORE);
	return true;
}

/* False at the agent's end. Answers are taken meanwhile, so that neither waits for the other. */
static bool send_bytes(const uint8_t *bytes, size_t length)
{
	while (length) {
		struct pollfd event = {.fd = port, .events = POLLIN | POLLOUT};
		CHECK(poll(&event, 1, HANG_MS) > 0);
		if (event.revents & POLLIN && !take_answers())
			return false;
		if (!(event.revents & POLLOUT))
			continue;
		ssize_t count = send(port, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (count < 0 && errno != EAGAIN)
			return false;
		bytes += count > 0 ? count : 0;
		length -= count > 0 ? (size_t)count : 0;
	}
	return true;
}

static size_t random_signal(uint8_t *bytes, size_t capacity)
{
	static const char *const SCOPES[] = {"group", "all", "resize", "group", "resize", "nothing"};
	struct msgpack_writer map = {.bytes = bytes, .capacity = capacity};
	bool wild = !random_number(20); /* what breaks the protocol ends the session */
	msgpack_write_map(&map, 4);
	msgpack_write_string(&map, "scope");
	msgpack_write_string(&map, SCOPES[random_number(5 + wild)]);
	put_integer(&map, "signal", wild ? random_integer() : random_number(65));
	put_integer(&map, "rows", wild ? random_integer() : random_number(1000));
	put_integer(&map, "cols", wild ? random_integer() : random_number(1000));
	return map.length;
}

static size_t random_open(uint8_t *payload, size_t capacity)
{
	bool exec = random_number(2);
	size_t length = exec ? random_exec(payload, capacity) : random_request(payload, capacity);
	opened[last_opened].exec = exec;
	opened[last_opened].ended = false;
	return random_number(30) ? length : mutated(payload, length);
}

/* One frame of a session that mostly keeps to the protocol, so that it gets somewhere. Returns the payload's length. */
static size_t random_frame(uint8_t *payload, size_t capacity, uint8_t *type, uint8_t *channel, uint32_t *stream)
{
	static const uint8_t TYPES[] = {FRAME_DATA, FRAME_DATA, FRAME_CREDIT, FRAME_SIGNAL, FRAME_SIGNAL, FRAME_END, FRAME_RESET};
	*channel = 0;
	if (!last_opened || !random_number(3)) {
		*type = FRAME_OPEN;
		*stream = ++last_opened;
		return random_open(payload, capacity);
	}
	if (!random_number(12)) {
		*stream = 0;
		*type = random_number(2) ? FRAME_QUIESCE : FRAME_RESUME;
		return 0;
	}
	*stream = random_number(2) ? last_opened : 1 + random_number(last_opened);
	*type = TYPES[random_number(sizeof(TYPES))];
	bool wrong = (*type == FRAME_SIGNAL && !opened[*stream].exec) || (*type == FRAME_DATA && opened[*stream].ended);
	if (wrong && random_number(50))
		*type = FRAME_RESET;
	opened[*stream].ended = opened[*stream].ended || *type == FRAME_END;
	switch (*type) {
	case FRAME_DATA: return 1 + random_number(random_number(3) ? 1000 : MAX_DATA);
	case FRAME_CREDIT:
		*channel = (uint8_t)(1 + (opened[*stream].exec && random_number(2)));
		encode_u32(payload, random_number(64) ? random_number(100000) : UINT32_MAX);
		return 4;
	case FRAME_SIGNAL: return random_signal(payload, capacity);
	case FRAME_RESET: return 4;
	default: return 0;
	}
}

/* Frames, some of them broken. False at the agent's end; `open` when it still waits for a frame's beginning. */
static bool talk(bool *open)
{
	static uint8_t bytes[HEADER_SIZE + MAX_DATA];
	for (uint32_t left = random_number(100); left; left--) {
		uint8_t type, channel;
		uint32_t stream;
		size_t length = random_frame(bytes + HEADER_SIZE, sizeof(bytes) - HEADER_SIZE, &type, &channel, &stream);
		encode_header(bytes, type, channel, stream, (uint32_t)length);
		uint32_t broken = random_number(300 * HEADER_SIZE);
		if (broken < HEADER_SIZE)
			bytes[broken] ^= (uint8_t)(1 << random_number(8));
		uint32_t times = type == FRAME_DATA && !random_number(40) ? 1 + 2 * INITIAL_CREDIT / (uint32_t)length : 1;
		while (times--) /* many: more than there is credit for, unless somebody takes it */
			if (!send_bytes(bytes, HEADER_SIZE + length))
				return false;
		if (!random_number(15))
			poll(NULL, 0, 2); /* programs end, and operations have been answered */
		if (broken < sizeof(uint32_t)) {
			*open = false; /* of another length: it may wait for the rest, or take the next frame for it */
			return true;
		}
	}
	return true;
}

/* An agent that has not refused all that goes on and still runs a program to its end. False at its end. */
static bool runs_a_program(void)
{
	static const char PROGRAM[] = "\x86\xa2" "op" "\xa4" "exec" "\xa4" "argv" "\x91\xa4" "true" "\xa3" "env" "\x90"
		"\xa3" "cwd" "\xa1" "/" "\xa3" "uid" "\x00" "\xa3" "gid" "\x00";
	const size_t length = sizeof(PROGRAM) - 1;
	uint8_t bytes[2 * HEADER_SIZE + sizeof(PROGRAM)];
	encode_header(bytes, FRAME_RESUME, 0, 0, 0);
	encode_header(bytes + HEADER_SIZE, FRAME_OPEN, 0, LAST_STREAM, (uint32_t)length);
	memcpy(bytes + 2 * HEADER_SIZE, PROGRAM, length);
	if (!send_bytes(bytes, 2 * HEADER_SIZE + length))
		return false;
	while (!last_exit) {
		struct pollfd event = {.fd = port, .events = POLLIN};
		CHECK(poll(&event, 1, HANG_MS) > 0);
		if (!take_answers())
			return false;
	}
	return true;
}

static void session(void)
{
	int ends[2], status;
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	pid_t agent = fork();
	CHECK(agent >= 0);
	if (!agent) {
		close(ends[0]);
		be_agent(ends[1]);
	}
	close(ends[1]);
	port = ends[0];
	last_opened = 0;
	decoder_init(&decoder, answers, sizeof(answers));
	last_exit = false;
	bool open = true, lives = talk(&open) && (!open || runs_a_program());
	if (lives)
		CHECK(!syscall(SYS_kill, agent, SIGKILL)); /* `kill` is replaced */
	CHECK(waitpid(agent, &status, 0) == agent);
	bool refused = WIFEXITED(status) && WEXITSTATUS(status) == REFUSED;
	CHECK(refused || (lives && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
	refusals += refused;
	close(port);
}

int main(int count, char **arguments)
{
	long rounds = count > 1 ? strtol(arguments[1], NULL, 10) / 50 : 300;
	random_begin(count > 2 ? strtoull(arguments[2], NULL, 10) : 1);
	for (long i = 0; i < rounds; i++)
		session();
	CHECK(exits > rounds / 4 && refusals > 0); /* sessions get somewhere, and some too far */
	printf("ok fuzz_control: %ld sessions, %ld refused, %ld replies, %ld exits\n", rounds, refusals, replies, exits);
	return 0;
}
