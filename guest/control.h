/* The control port: streams, replies, and rest. Everything here but the replies belongs to the control thread. */
#ifndef TASKVM_CONTROL_H
#define TASKVM_CONTROL_H

#include "frames.h"
#include "loop.h"
#include "port.h"
#include "request.h"

/* A stream the host opened and that may still get frames. */
struct stream {
	uint32_t id;
	struct stream *next;
	void (*take)(struct stream *stream, const struct frame *frame);
};

extern struct port control_port;
extern struct loop control_loop;

void stream_add(struct stream *stream);
void stream_remove(struct stream *stream);

/* Answer an OPEN; from any thread. */
void reply_done(uint32_t stream);
void reply_failure(uint32_t stream, const struct failure *failure);
void write_failure(struct msgpack_writer *map, const struct failure *failure);
void reply_map(uint32_t stream, const struct msgpack_writer *map);
void send_u32(uint8_t type, uint8_t channel, uint32_t stream, uint32_t value);
/* The host broke the protocol: the machine goes down. */
_Noreturn void protocol_error(const struct frame *frame, const char *reason);

/* Serve the control port for good. */
_Noreturn void control_run(int fd, const char *kernel);

#endif
