/* Running programs (docs/protocol-control.md, exec). All of it runs in the control thread and never blocks.
 *
 * An exec lives from its OPEN until three things are true: its main process was reaped, its pipes are closed, its cgroup is
 * removed. Its EXIT is sent long before that when children live on; SIGNAL and RESET reach them through the cgroup.
 */
#include "exec.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "accounting.h"
#include "cgroup.h"
#include "control.h"
#include "kernel.h"
#include "log.h"
#include "pipes.h"
#include "pool.h"
#include "pty.h"
#include "spawn.h"

/* A spawn waits for a slot while as many others wait for a file system (execve, chdir). */
enum { MAX_SPAWNS = 16 };

struct exec {
	struct stream stream;
	struct exec *next;
	struct spawn spawn;
	struct input input;
	struct output out, err;
	bool started, exited, alone; /* `alone`: its cgroup is gone */
	bool mute;                   /* EXIT was sent, or RESET came: no frame may follow */
	bool kill_at_start;
	int status, signal_at_start;
	struct msgpack_writer exit; /* the map of EXIT, from the main process's end on */
	uint8_t exit_bytes[256];
	struct source group_source;
	int group, group_events;
};

static struct pool spawners;
static struct exec *execs, *ended;
static struct source child_source;
static int child_signals;

/* The end. */

static void retire(struct exec *exec)
{
	if (!exec->alone || !exec->exited || exec->out.fd >= 0 || exec->err.fd >= 0)
		return;
	for (struct exec **link = &execs; *link; link = &(*link)->next)
		if (*link == exec) {
			*link = exec->next;
			exec->next = ended;
			ended = exec;
			stream_remove(&exec->stream);
			input_close(&exec->input);
			return;
		}
}

void exec_settle(void)
{
	while (ended) {
		struct exec *exec = ended;
		ended = exec->next;
		if (exec->group_events >= 0) {
			loop_remove(&control_loop, exec->group_events);
			close(exec->group_events);
		}
		if (exec->group >= 0)
			close(exec->group);
		spawn_free(&exec->spawn);
		free(exec);
	}
}

static void remove_group(struct exec *exec)
{
	if (!exec->alone && cgroup_remove(exec->stream.id))
		exec->alone = true;
}

static void group_ready(struct source *source, uint32_t events)
{
	struct exec *exec = container_of(source, struct exec, group_source);
	(void)events;
	if (cgroup_event(exec->group_events, "populated 0"))
		remove_group(exec);
	retire(exec);
}

/* Children live on: watch for the last one's end. */
static void watch_group(struct exec *exec)
{
	exec->group_events = cgroup_open_events(exec->group);
	if (exec->group_events < 0)
		return;
	exec->group_source.ready = group_ready;
	loop_add(&control_loop, exec->group_events, &exec->group_source, EPOLLPRI);
	group_ready(&exec->group_source, 0);
}

static void be_mute(struct exec *exec)
{
	exec->mute = exec->input.mute = true;
	exec->out.ended = exec->err.ended = true;
}

static void report_exit(struct exec *exec)
{
	if (exec->mute || !exec->exited || !exec->out.ended || !exec->err.ended)
		return;
	struct msgpack_writer *map = &exec->exit;
	port_send(&control_port, FRAME_EXIT, 0, exec->stream.id, map->bytes, map->length);
	be_mute(exec);
}

static void advance(struct exec *exec)
{
	output_pump(&exec->out);
	output_pump(&exec->err);
	report_exit(exec);
	retire(exec);
}

static void write_exit(struct exec *exec)
{
	struct msgpack_writer *map = &exec->exit;
	*map = (struct msgpack_writer){.bytes = exec->exit_bytes, .capacity = sizeof(exec->exit_bytes)};
	msgpack_write_map(map, 2);
	msgpack_write_string(map, WIFSIGNALED(exec->status) ? "signal" : "code");
	msgpack_write_integer(map, WIFSIGNALED(exec->status) ? WTERMSIG(exec->status) : WEXITSTATUS(exec->status));
	msgpack_write_string(map, "usage");
	accounting_write(map, exec->group);
}

/* What is in the pipes now is the main process's last word, and what its cgroup has used now its bill; what comes later is
 * not waited for. */
static void finish(struct exec *exec)
{
	write_exit(exec);
	output_limit(&exec->out);
	output_limit(&exec->err);
	advance(exec); /* the host learns of the end before its cgroup is removed, which takes longer than all else here */
	remove_group(exec);
	if (!exec->alone)
		watch_group(exec);
	retire(exec);
}

static void children_ready(struct source *source, uint32_t events)
{
	(void)source, (void)events;
	struct signalfd_siginfo information[4];
	while (read(child_signals, information, sizeof(information)) > 0)
		continue;
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		struct exec *exec = execs;
		while (exec && (exec->exited || exec->spawn.pid != pid))
			exec = exec->next;
		if (!exec)
			continue; /* an orphan, adopted by PID 1 */
		exec->exited = true;
		exec->status = status;
		if (exec->started)
			finish(exec);
	}
}

/* Signals. */

static void signal_group(struct exec *exec, int signal)
{
	if (!exec->exited)
		kill(-exec->spawn.pid, signal);
	else if (!exec->alone)
		cgroup_signal_group(exec->group, exec->spawn.pid, signal);
}

static void kill_exec(struct exec *exec)
{
	if (!exec->started)
		exec->kill_at_start = true;
	else if (!exec->alone)
		cgroup_kill(exec->group);
}

/* The kernel signals SIGWINCH. A size that comes before the program's start is out of date by then: the REPLY is not sent yet. */
static void resize(struct exec *exec, const struct frame *frame)
{
	struct winsize size;
	if (!pty_read_size(frame->payload, frame->length, &size))
		protocol_error(frame, "no size of a terminal");
	if (exec->started && exec->spawn.tty && exec->out.fd >= 0)
		ioctl(exec->out.fd, TIOCSWINSZ, &size);
}

static bool is_scope(const struct msgpack_value *scope, const char *name)
{
	return scope->length == strlen(name) && !memcmp(scope->bytes, name, scope->length);
}

static void take_signal(struct exec *exec, const struct frame *frame)
{
	struct msgpack_value scope, signal;
	if (!msgpack_valid(frame->payload, frame->length) ||
	    !msgpack_find(frame->payload, frame->length, "scope", &scope) || scope.type != MSGPACK_BYTES)
		protocol_error(frame, "not a map with a scope");
	if (is_scope(&scope, "resize")) {
		resize(exec, frame);
		return;
	}
	if (!msgpack_find(frame->payload, frame->length, "signal", &signal) || signal.type != MSGPACK_INTEGER ||
	    signal.integer < 0 || signal.integer > SIGRTMAX)
		protocol_error(frame, "not a map of scope and signal");
	if (is_scope(&scope, "all"))
		kill_exec(exec);
	else if (exec->started)
		signal_group(exec, (int)signal.integer);
	else
		exec->signal_at_start = (int)signal.integer;
}

static void take_reset(struct exec *exec)
{
	be_mute(exec);
	kill_exec(exec);
	input_close(&exec->input);
	if (exec->started)
		advance(exec);
}

static void take_credit(struct exec *exec, const struct frame *frame)
{
	if (frame->channel != CHANNEL_STDOUT && frame->channel != CHANNEL_STDERR)
		protocol_error(frame, "no such output channel");
	struct output *output = frame->channel == CHANNEL_STDOUT ? &exec->out : &exec->err;
	output->credit += decode_u32(frame->payload);
	if (output->credit > INT32_MAX)
		protocol_error(frame, "credit overflow");
	if (exec->started)
		advance(exec);
}

static void take_frame(struct stream *stream, const struct frame *frame)
{
	struct exec *exec = container_of(stream, struct exec, stream);
	switch (frame->type) {
	case FRAME_RESET: take_reset(exec); break;
	case FRAME_SIGNAL: take_signal(exec, frame); break;
	case FRAME_CREDIT: take_credit(exec, frame); break;
	case FRAME_DATA: input_take(&exec->input, frame); break;
	case FRAME_END: input_end(&exec->input); break;
	default: protocol_error(frame, "no frame for an exec");
	}
}

/* The beginning. */

static void out_moved(struct output *output)
{
	advance(container_of(output, struct exec, out));
}

static void err_moved(struct output *output)
{
	advance(container_of(output, struct exec, err));
}

static void reply_started(const struct exec *exec)
{
	uint8_t bytes[32];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, 1);
	msgpack_write_string(&map, "pid");
	msgpack_write_integer(&map, exec->spawn.pid);
	if (!exec->mute)
		reply_map(exec->stream.id, &map);
}

static void started(struct exec *exec)
{
	exec->started = true;
	exec->group = exec->spawn.cgroup;
	reply_started(exec);
	output_start(&exec->out, exec->spawn.out, exec->spawn.tty);
	output_start(&exec->err, exec->spawn.err, false);
	input_start(&exec->input, exec->spawn.in, exec->spawn.tty);
	if (exec->kill_at_start)
		cgroup_kill(exec->group);
	if (exec->signal_at_start)
		signal_group(exec, exec->signal_at_start);
	if (exec->exited)
		finish(exec);
}

static void spawn_done(struct job *job)
{
	struct exec *exec = container_of(job, struct exec, spawn.job);
	if (!exec->spawn.failure.call) {
		started(exec);
		return;
	}
	if (!exec->mute)
		reply_failure(exec->stream.id, &exec->spawn.failure);
	exec->alone = exec->exited = true;
	retire(exec);
}

void exec_open(struct request *request)
{
	struct exec *exec = calloc(1, sizeof(*exec));
	if (!exec) {
		reply_failure(request->stream, &(struct failure){ENOMEM, "malloc"});
		free(request);
		return;
	}
	exec->stream = (struct stream){.id = request->stream, .take = take_frame};
	exec->group = exec->group_events = -1;
	input_init(&exec->input, request->stream);
	output_init(&exec->out, request->stream, CHANNEL_STDOUT, out_moved);
	output_init(&exec->err, request->stream, CHANNEL_STDERR, err_moved);
	exec->next = execs;
	execs = exec;
	stream_add(&exec->stream);
	spawn_init(&exec->spawn, request);
	exec->spawn.job.done = spawn_done;
	pool_submit(&spawners, &exec->spawn.job);
}

/* The first goes last, so that the port's room is not always the same exec's. */
static void rotate(void)
{
	struct exec *first = execs, **link = &execs;
	if (!first || !first->next)
		return;
	execs = first->next;
	while (*link)
		link = &(*link)->next;
	first->next = NULL;
	*link = first;
}

void exec_resume(void)
{
	struct exec *next;
	rotate();
	for (struct exec *exec = execs; exec; exec = next) {
		next = exec->next;
		if (exec->started)
			advance(exec);
	}
}

void exec_init(void)
{
	sigset_t signals;
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	child_signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	if (child_signals < 0)
		fatal("signalfd: %s", strerror(errno));
	child_source.ready = children_ready;
	loop_add(&control_loop, child_signals, &child_source, EPOLLIN);
	pipes_init();
	pool_init(&spawners, MAX_SPAWNS);
}
