/* Running programs (docs/protocol-control.md, exec). All of it runs in the control thread and never blocks.
 *
 * An exec lives from its OPEN until three things are true: its main process was reaped, its pipes are closed, its cgroup is
 * removed. Its EXIT is sent long before that when children live on; SIGNAL and RESET reach them through the cgroup.
 */
#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cgroup.h"
#include "control.h"
#include "kernel.h"
#include "log.h"
#include "pool.h"
#include "spawn.h"

/* A spawn waits for a slot while as many others wait for a file system (execve, chdir). */
enum { MAX_SPAWNS = 16 };
/* A program that fills its pipe once will do so again: let it run on while the port takes the last piece. */
enum { BUSY_PIPE_SIZE = 256 * 1024 };
#define LIVE INT64_MAX

struct exec;

struct output {
	struct source source;
	struct exec *exec;
	int fd;
	uint8_t channel;
	bool readable, busy, ended; /* `ended`: END was sent, or is not due */
	int64_t credit;
	int64_t left; /* how much of the pipe is still to be sent: what it held when the main process ended */
};

struct input {
	struct source source;
	int fd;
	bool ended, watched;
	uint8_t *bytes; /* what the program has not read yet; INITIAL_CREDIT of room, made when first needed */
	size_t start, length;
	uint32_t window, owed;
};

struct exec {
	struct stream stream;
	struct exec *next;
	struct spawn spawn;
	struct input input;
	struct output outputs[2];
	bool started, exited, mute, alone; /* `mute`: no frame may be sent any more; `alone`: its cgroup is gone */
	bool kill_at_start;
	int status, signal_at_start;
	struct source group_source;
	int group, group_events;
};

static struct pool spawners;
static struct exec *execs, *ended;
static struct source child_source;
static int child_signals, null_device;

/* Output. */

static void close_output(struct output *output)
{
	loop_remove(&control_loop, output->fd);
	close(output->fd);
	output->fd = -1;
}

static void end_output(struct output *output)
{
	if (!output->ended && !output->exec->mute)
		port_send(&control_port, FRAME_END, output->channel, output->exec->stream.id, NULL, 0);
	output->ended = true;
}

static void drop_output(struct output *output)
{
	ssize_t count = splice(output->fd, NULL, null_device, NULL, 1 << 20, SPLICE_F_NONBLOCK);
	if (count == 0)
		close_output(output);
	else if (count > 0) /* once an event, so that a program that never stops does not stop the others */
		loop_change(&control_loop, output->fd, &output->source, EPOLLIN);
}

/* Send one piece. False when there is nothing to do until credit, room or an event comes. */
static bool send_piece(struct output *output)
{
	int64_t size = output->credit < output->left ? output->credit : output->left;
	if (size > MAX_DATA)
		size = MAX_DATA;
	uint8_t *place = size > 0 ? port_lend(&control_port, (size_t)size) : NULL;
	if (!place)
		return false;
	ssize_t count = read(output->fd, place, (size_t)size);
	int error = errno;
	port_commit(&control_port, FRAME_DATA, output->channel, output->exec->stream.id, count > 0 ? (size_t)count : 0);
	if (count > 0) {
		output->credit -= count;
		if (output->left != LIVE)
			output->left -= count;
		if (count == MAX_DATA && !output->busy) {
			output->busy = true;
			fcntl(output->fd, F_SETPIPE_SZ, BUSY_PIPE_SIZE);
		}
		return true;
	}
	if (count < 0 && error == EAGAIN)
		output->readable = false;
	if (count == 0 || output->left != LIVE)
		end_output(output); /* a child may have read its own pipe empty, so an empty one ends what was left, too */
	if (count == 0)
		close_output(output);
	return false;
}

static void pump_output(struct output *output)
{
	while (output->fd >= 0 && !output->ended && output->readable) {
		if (output->left == 0)
			end_output(output);
		else if (!send_piece(output))
			break;
	}
	if (output->fd >= 0 && output->ended)
		drop_output(output);
}

/* Input. */

static void close_input(struct input *input)
{
	if (input->fd >= 0) {
		if (input->watched)
			loop_remove(&control_loop, input->fd);
		close(input->fd);
	}
	input->fd = -1;
	free(input->bytes);
	input->bytes = NULL;
	input->owed += (uint32_t)input->length;
	input->length = 0;
}

static void grant_input(struct exec *exec)
{
	struct input *input = &exec->input;
	if (input->owed < INITIAL_CREDIT / 2 || exec->mute)
		return;
	send_u32(FRAME_CREDIT, CHANNEL_STDIN, exec->stream.id, input->owed);
	input->window += input->owed;
	input->owed = 0;
}

static void watch_input(struct input *input)
{
	if (!input->watched)
		loop_add(&control_loop, input->fd, &input->source, EPOLLOUT);
	input->watched = true;
}

static void pump_input(struct exec *exec)
{
	struct input *input = &exec->input;
	while (input->length) {
		ssize_t count = write(input->fd, input->bytes + input->start, input->length);
		if (count < 0 && errno == EAGAIN) {
			watch_input(input);
			break;
		}
		if (count < 0) {
			close_input(input); /* EPIPE: nobody reads any more */
			break;
		}
		input->start += (size_t)count;
		input->length -= (size_t)count;
		input->owed += (uint32_t)count;
	}
	if (!input->length && input->ended)
		close_input(input);
	grant_input(exec);
}

static void keep_input(struct exec *exec, const uint8_t *bytes, size_t length)
{
	struct input *input = &exec->input;
	if (!input->bytes)
		input->bytes = malloc(INITIAL_CREDIT);
	if (!input->bytes)
		fatal("keep the input of exec %u: out of memory", exec->stream.id);
	memmove(input->bytes, input->bytes + input->start, input->length);
	input->start = 0;
	memcpy(input->bytes + input->length, bytes, length); /* fits: the window is as large as the buffer */
	input->length += length;
}

static void take_input(struct exec *exec, const struct frame *frame)
{
	struct input *input = &exec->input;
	if (frame->channel != CHANNEL_STDIN || input->ended)
		protocol_error(frame, input->ended ? "DATA after END" : "no such input channel");
	if (frame->length > input->window)
		protocol_error(frame, "more DATA than credit");
	input->window -= frame->length;
	if (exec->started && input->fd < 0) {
		input->owed += frame->length;
		grant_input(exec);
		return;
	}
	keep_input(exec, frame->payload, frame->length);
	if (exec->started)
		pump_input(exec);
}

/* The end. */

static void retire(struct exec *exec)
{
	if (!exec->alone || !exec->exited || exec->outputs[0].fd >= 0 || exec->outputs[1].fd >= 0)
		return;
	for (struct exec **link = &execs; *link; link = &(*link)->next)
		if (*link == exec) {
			*link = exec->next;
			exec->next = ended;
			ended = exec;
			stream_remove(&exec->stream);
			close_input(&exec->input);
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

static void report_exit(struct exec *exec)
{
	if (exec->mute || !exec->exited || !exec->outputs[0].ended || !exec->outputs[1].ended)
		return;
	uint8_t bytes[32];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, 1);
	msgpack_write_string(&map, WIFSIGNALED(exec->status) ? "signal" : "code");
	msgpack_write_integer(&map, WIFSIGNALED(exec->status) ? WTERMSIG(exec->status) : WEXITSTATUS(exec->status));
	port_send(&control_port, FRAME_EXIT, 0, exec->stream.id, map.bytes, map.length);
	exec->mute = true;
}

static void advance(struct exec *exec)
{
	pump_output(&exec->outputs[0]);
	pump_output(&exec->outputs[1]);
	report_exit(exec);
	retire(exec);
}

/* What is in the pipes now is the main process's last word; what comes later is not waited for. */
static void finish(struct exec *exec)
{
	for (int i = 0; i < 2; i++) {
		struct output *output = &exec->outputs[i];
		int held = 0;
		if (output->fd < 0)
			continue;
		ioctl(output->fd, FIONREAD, &held);
		output->left = held;
		output->readable = true;
	}
	remove_group(exec);
	advance(exec);
	if (!exec->alone)
		watch_group(exec);
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

static void take_signal(struct exec *exec, const struct frame *frame)
{
	struct msgpack_reader reader = {frame->payload, frame->payload + frame->length};
	struct msgpack_value scope, signal;
	if (!msgpack_valid(reader.next, frame->length) || !msgpack_find(reader.next, frame->length, "scope", &scope) ||
	    !msgpack_find(reader.next, frame->length, "signal", &signal) || scope.type != MSGPACK_BYTES ||
	    signal.type != MSGPACK_INTEGER || signal.integer < 0 || signal.integer > SIGRTMAX)
		protocol_error(frame, "not a map of scope and signal");
	if (scope.length == 3 && !memcmp(scope.bytes, "all", 3))
		kill_exec(exec);
	else if (exec->started)
		signal_group(exec, (int)signal.integer);
	else
		exec->signal_at_start = (int)signal.integer;
}

static void take_reset(struct exec *exec)
{
	exec->mute = true;
	kill_exec(exec);
	exec->input.ended = true;
	close_input(&exec->input);
	exec->outputs[0].ended = exec->outputs[1].ended = true;
	if (exec->started)
		advance(exec);
}

static void take_credit(struct exec *exec, const struct frame *frame)
{
	if (frame->channel != CHANNEL_STDOUT && frame->channel != CHANNEL_STDERR)
		protocol_error(frame, "no such output channel");
	struct output *output = &exec->outputs[frame->channel - CHANNEL_STDOUT];
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
	case FRAME_DATA:
		if (!exec->mute)
			take_input(exec, frame);
		break;
	case FRAME_END:
		exec->input.ended = true;
		if (exec->started && exec->input.fd >= 0)
			pump_input(exec);
		break;
	default: protocol_error(frame, "no frame for an exec");
	}
}

/* The beginning. */

static void output_ready(struct source *source, uint32_t events)
{
	struct output *output = container_of(source, struct output, source);
	(void)events;
	output->readable = true;
	advance(output->exec);
}

static void input_ready(struct source *source, uint32_t events)
{
	struct exec *exec = container_of(source, struct exec, input.source);
	(void)events;
	if (exec->input.fd >= 0)
		pump_input(exec);
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

static void watch_output(struct output *output, int fd)
{
	output->fd = fd;
	output->ended = output->ended || fd < 0;
	if (fd >= 0)
		loop_add(&control_loop, fd, &output->source, EPOLLIN);
}

static void started(struct exec *exec)
{
	exec->started = true;
	exec->group = exec->spawn.cgroup;
	exec->input.fd = exec->spawn.in;
	reply_started(exec);
	watch_output(&exec->outputs[0], exec->spawn.out);
	watch_output(&exec->outputs[1], exec->spawn.err);
	if (exec->kill_at_start)
		cgroup_kill(exec->group);
	if (exec->signal_at_start)
		signal_group(exec, exec->signal_at_start);
	pump_input(exec);
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
	exec->input = (struct input){.source.ready = input_ready, .fd = -1, .window = INITIAL_CREDIT};
	for (int i = 0; i < 2; i++)
		exec->outputs[i] = (struct output){.source.ready = output_ready, .exec = exec, .fd = -1,
			.channel = (uint8_t)(CHANNEL_STDOUT + i), .credit = INITIAL_CREDIT, .left = LIVE};
	exec->next = execs;
	execs = exec;
	stream_add(&exec->stream);
	spawn_init(&exec->spawn, request);
	exec->spawn.job.done = spawn_done;
	pool_submit(&spawners, &exec->spawn.job);
}

void exec_resume(void)
{
	struct exec *next;
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
	null_device = open("/dev/null", O_WRONLY | O_CLOEXEC);
	if (child_signals < 0 || null_device < 0)
		fatal("make signalfd and open /dev/null: %s", strerror(errno));
	child_source.ready = children_ready;
	loop_add(&control_loop, child_signals, &child_source, EPOLLIN);
	pool_init(&spawners, MAX_SPAWNS);
}
