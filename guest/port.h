/* One virtio-serial port: frames in by callback, frames out by a bounded ring that any thread may fill.
 *
 * Rule 1: producers of bulk (pipes, files, sockets, FUSE requests) stop while the ring holds PORT_HIGH_WATER bytes.
 *         Single frames (replies, credit, exits) are never refused: they wait in a list of their own, in order.
 * Rule 2: the lock is held for copies and non-blocking writes only, never while waiting for the host.
 * Rule 3: while held (QUIESCE), nothing is added but what is urgent; all the rest waits for port_release.
 */
#ifndef TASKVM_PORT_H
#define TASKVM_PORT_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "frames.h"
#include "loop.h"

#define PORT_HIGH_WATER (256 * 1024)

struct late_frame;

struct port {
	const char *name;
	int fd;
	struct loop *loop;
	struct source source;
	void (*take)(const struct frame *frame);
	void (*room)(void); /* bulk producers of the loop's own thread may go on; may be NULL */
	struct decoder decoder;

	pthread_mutex_t lock;
	pthread_cond_t space;
	uint8_t *ring; /* mapped twice in a row: any `size` bytes from within the first copy are contiguous */
	size_t size, head, used, late_bytes;
	bool held, waiting; /* `waiting`: EPOLLOUT is armed */
	struct late_frame *late_first, **late_last;
};

/* `max_payload` is the largest frame either way. The ring holds PORT_HIGH_WATER and one such frame. */
void port_init(struct port *port, const char *name, int fd, size_t max_payload);
/* Begin to read in `loop`'s thread, which calls `take` for each frame. */
void port_attach(struct port *port, struct loop *loop, void (*take)(const struct frame *), void (*room)(void));

/* Queue a frame; never blocks. */
void port_send(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, size_t length);
/* The same, even while held. */
void port_send_urgent(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload,
		      size_t length);
/* The same as port_send from a thread that may wait: until the ring has room and the port is not held. */
void port_send_wait(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, size_t length);

/* The same, but the frame stays in the ring until the next one is sent, port_flush is called, or there are many. */
void port_send_late(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, size_t length);
void port_flush(struct port *port);

/* Lend the payload's place of the next frame in the ring, or NULL when there is no room; the caller fills it without
 * blocking and must commit. A length of 0 takes it back. */
uint8_t *port_lend(struct port *port, size_t length);
void port_commit(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, size_t length);

/* Come to rest: after what is in the ring goes QUIESCED, and then nothing until port_release. */
void port_hold(struct port *port);
void port_release(struct port *port);

#endif
