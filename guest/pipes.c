/* A program's pipes. Output goes from the pipe straight into the port's ring, without a buffer between them. */
#include "pipes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "control.h"
#include "kernel.h"
#include "log.h"
#include "pty.h"

/* A program that fills its pipe once will do so again: let it run on while the port takes the last piece. */
enum { BUSY_PIPE_SIZE = 256 * 1024 };
enum { DROP_AT_ONCE = 1024 * 1024 };
/* More than a terminal holds between the programs that write and the agent (drivers/tty: 8192 bytes and a page, and what is under way). */
enum { TERMINAL_HOLDS = 64 * 1024 };
/* When to look whether the end of input that was typed has been read, in milliseconds after the last time: each twice the one before. */
enum { FIRST_LOOK_MS = 10, LAST_LOOK_MS = 1000 };
#define NO_LIMIT INT64_MAX

static int null_device;

void pipes_init(void)
{
	null_device = open("/dev/null", O_WRONLY | O_CLOEXEC);
	if (null_device < 0)
		fatal("open /dev/null: %s", strerror(errno));
}

/* Output. */

static void close_output(struct output *output)
{
	loop_remove(&control_loop, output->fd);
	close(output->fd);
	output->fd = -1;
}

static void end_output(struct output *output)
{
	output->ended = true;
	port_send(&control_port, FRAME_END, output->channel, output->stream, NULL, 0);
}

/* EIO: no program has the terminal open. That is its end only after the main process's: before, one may open /dev/tty again, and
 * closing the leader would send SIGHUP to a program that closes its descriptors and then exits, as cat does. */
static ssize_t read_output(const struct output *output, uint8_t *bytes, size_t size)
{
	ssize_t count = read(output->fd, bytes, size);
	if (count >= 0 || errno != EIO || !output->tty)
		return count;
	if (output->left != NO_LIMIT)
		return 0;
	errno = EAGAIN;
	return -1;
}

static void drop_output(struct output *output)
{
	uint8_t bytes[4096];
	ssize_t count = output->tty ? read_output(output, bytes, sizeof(bytes)) : /* splice wants a pipe */
		splice(output->fd, NULL, null_device, NULL, DROP_AT_ONCE, SPLICE_F_NONBLOCK);
	if (count == 0)
		close_output(output);
	else if (count > 0) /* more in its turn, so that a program that never stops does not stop the others */
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
	ssize_t count = read_output(output, place, (size_t)size);
	int error = errno;
	port_commit(&control_port, FRAME_DATA, output->channel, output->stream, count > 0 ? (size_t)count : 0);
	if (count > 0) {
		output->credit -= count;
		if (output->left != NO_LIMIT)
			output->left -= count;
		if (count == MAX_DATA && !output->busy) {
			output->busy = true;
			fcntl(output->fd, F_SETPIPE_SZ, BUSY_PIPE_SIZE);
		}
		return true;
	}
	output->readable = count == 0 || error != EAGAIN;
	if (count == 0 || output->left != NO_LIMIT)
		end_output(output); /* a child may have emptied its own pipe: then nothing is left of what was */
	if (count == 0)
		close_output(output);
	return false;
}

void output_pump(struct output *output)
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

static void output_ready(struct source *source, uint32_t events)
{
	struct output *output = container_of(source, struct output, source);
	(void)events;
	output->readable = true;
	output->moved(output);
}

void output_init(struct output *output, uint32_t stream, uint8_t channel, void (*moved)(struct output *))
{
	*output = (struct output){.source.ready = output_ready, .moved = moved, .stream = stream, .channel = channel,
		.fd = -1, .credit = INITIAL_CREDIT, .left = NO_LIMIT};
}

void output_start(struct output *output, int fd, bool tty)
{
	output->fd = fd;
	output->tty = tty;
	if (fd >= 0)
		loop_add(&control_loop, fd, &output->source, EPOLLIN);
	else
		output->ended = true;
}

void output_limit(struct output *output)
{
	int held = 0;
	if (output->fd < 0)
		return;
	if (output->tty) /* FIONREAD does not see what is on its way through the line discipline; read does */
		held = TERMINAL_HOLDS;
	else
		ioctl(output->fd, FIONREAD, &held);
	output->left = held;
	output->readable = true;
}

/* Input. */

void input_close(struct input *input)
{
	if (input->fd >= 0) {
		if (input->watched)
			loop_remove(&control_loop, input->fd);
		close(input->fd);
	}
	input->fd = -1;
	if (input->end_timer >= 0) {
		loop_remove(&control_loop, input->end_timer);
		close(input->end_timer);
	}
	input->end_timer = -1;
	free(input->bytes);
	input->bytes = NULL;
	input->owed += (uint32_t)input->length;
	input->length = 0;
}

static void grant(struct input *input)
{
	if (input->owed < INITIAL_CREDIT / 2 || input->mute || input->ended)
		return;
	send_u32(FRAME_CREDIT, CHANNEL_STDIN, input->stream, input->owed);
	input->window += input->owed;
	input->owed = 0;
}

static void watch(struct input *input)
{
	if (!input->watched)
		loop_add(&control_loop, input->fd, &input->source, EPOLLOUT);
	input->watched = true;
}

/* A pipe that has ended has ended for all who read it. On a terminal the end is a byte that the first one takes away, and that a
 * program which is still starting loses: bash finds a NUL in its place, where it makes the terminal raw after it was typed. So it
 * is typed when everything before it has been read, and once more whenever it has been. */
static void type_end(struct input *input)
{
	uint8_t end = pty_end_byte(input->fd);
	if (end && !pty_is_unread(input->fd) && write(input->fd, &end, 1) < 0 && errno != EAGAIN)
		say("type the end of the input of exec %u: %s", input->stream, strerror(errno));
	if (input->end_timer < 0)
		return;
	input->end_ms = input->end_ms * 2 < LAST_LOOK_MS ? input->end_ms * 2 : LAST_LOOK_MS;
	struct itimerspec look = {.it_value = {input->end_ms / 1000, (long)(input->end_ms % 1000) * 1000000}};
	timerfd_settime(input->end_timer, 0, &look, NULL);
}

static void end_ready(struct source *source, uint32_t events)
{
	struct input *input = container_of(source, struct input, end_source);
	(void)events;
	if (input->mute) /* the program has ended */
		input_close(input);
	else if (input->end_timer >= 0)
		type_end(input);
}

static void begin_end(struct input *input)
{
	input->end_timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	input->end_ms = FIRST_LOOK_MS / 2;
	if (input->end_timer >= 0)
		loop_add(&control_loop, input->end_timer, &input->end_source, EPOLLIN);
	else
		say("timerfd_create for exec %u: %s", input->stream, strerror(errno)); /* typed once is what it is then */
	type_end(input);
}

static void pump(struct input *input)
{
	while (input->length) {
		ssize_t count = write(input->fd, input->bytes + input->start, input->length);
		if (count < 0 && errno == EAGAIN) {
			watch(input);
			break;
		}
		if (count < 0) {
			input_close(input); /* EPIPE: nobody reads any more */
			break;
		}
		input->start += (size_t)count;
		input->length -= (size_t)count;
		input->owed += (uint32_t)count;
	}
	if (!input->length && input->ended && input->fd >= 0 && input->end_timer < 0)
		input->tty ? begin_end(input) : input_close(input);
	grant(input);
}

static void input_ready(struct source *source, uint32_t events)
{
	struct input *input = container_of(source, struct input, source);
	(void)events;
	if (input->fd >= 0)
		pump(input);
}

void input_init(struct input *input, uint32_t stream)
{
	*input = (struct input){.source.ready = input_ready, .end_source.ready = end_ready, .stream = stream, .fd = -1, .end_timer = -1,
		.window = INITIAL_CREDIT};
}

void input_start(struct input *input, int fd, bool tty)
{
	input->fd = fd;
	input->tty = tty;
	input->started = true;
	if (input->mute)
		input_close(input);
	else
		pump(input);
}

static void keep(struct input *input, const uint8_t *bytes, size_t length)
{
	if (!input->bytes)
		input->bytes = malloc(INITIAL_CREDIT);
	if (!input->bytes)
		fatal("keep the input of exec %u: out of memory", input->stream);
	memmove(input->bytes, input->bytes + input->start, input->length);
	input->start = 0;
	memcpy(input->bytes + input->length, bytes, length); /* fits: the window is as large as the buffer */
	input->length += length;
}

void input_take(struct input *input, const struct frame *frame)
{
	if (input->mute)
		return;
	if (frame->channel != CHANNEL_STDIN || input->ended)
		protocol_error(frame, input->ended ? "DATA after END" : "no such input channel");
	if (frame->length > input->window)
		protocol_error(frame, "more DATA than credit");
	input->window -= frame->length;
	if (input->started && input->fd < 0) {
		input->owed += frame->length;
		grant(input);
		return;
	}
	keep(input, frame->payload, frame->length);
	if (input->started)
		pump(input);
}

void input_end(struct input *input)
{
	input->ended = true;
	if (input->fd >= 0)
		pump(input);
}
