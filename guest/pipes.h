/* The agent's ends of a program's pipes, or of its terminal: output with the host's credit, input with ours. In the control thread. */
#ifndef TASKVM_PIPES_H
#define TASKVM_PIPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "frames.h"
#include "loop.h"

struct output {
	struct source source;
	void (*moved)(struct output *output); /* called when the pipe has news */
	uint32_t stream;
	uint8_t channel;
	int fd; /* -1: closed, or not there */
	bool readable, busy;
	bool tty; /* `fd` is a terminal's leader */
	bool ended; /* END was sent, or is not due: what still comes is dropped */
	int64_t credit, left; /* `left`: how much of the pipe is still to be sent (output_limit) */
};

struct input {
	struct source source, end_source;
	uint32_t stream;
	int fd;
	int end_timer; /* -1 but where an END is typed: when to look whether it was read */
	uint32_t end_ms;
	bool tty; /* `fd` is a terminal's leader: an END is typed into it */
	bool started, ended, watched, mute; /* `mute`: no credit is due any more, and what comes is dropped */
	uint8_t *bytes; /* what the program has not read yet; INITIAL_CREDIT of room, made when first needed */
	size_t start, length;
	uint32_t window, owed;
};

void pipes_init(void);

void output_init(struct output *output, uint32_t stream, uint8_t channel, void (*moved)(struct output *));
/* The program runs; `fd` is -1 when it has no such pipe (merged). */
void output_start(struct output *output, int fd, bool tty);
/* Send, or drop, what there is and what credit and the port allow. */
void output_pump(struct output *output);
/* The main process has ended: what is in the pipe now is all that is sent. */
void output_limit(struct output *output);

void input_init(struct input *input, uint32_t stream);
void input_start(struct input *input, int fd, bool tty);
void input_take(struct input *input, const struct frame *frame);
void input_end(struct input *input);
void input_close(struct input *input);

#endif
