/* One virtio-serial port (drivers/char/virtio_console.c). A write moves at most 32 KiB and then waits for the host, so bytes of
 * many frames are collected in one ring and leave in the largest pieces the driver takes. */
#include "port.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel.h"
#include "log.h"

/* Beyond this the host has asked for more answers than it reads: no sound host does. */
enum { MAX_LATE_BYTES = 16 * 1024 * 1024 };
/* Kept free for QUIESCED and for the answers that are due while held: some dozens of bytes each. */
enum { URGENT_ROOM = 16 * 1024 };

struct late_frame {
	struct late_frame *next;
	size_t size;
	uint8_t bytes[];
};

static uint8_t *map_twice(size_t size)
{
	int memory = memfd_create("ring", MFD_CLOEXEC);
	if (memory < 0 || ftruncate(memory, (off_t)size) < 0)
		fatal("make a ring of %zu bytes: %s", size, strerror(errno));
	uint8_t *ring = mmap(NULL, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ring == MAP_FAILED)
		fatal("map a ring of %zu bytes: %s", size, strerror(errno));
	for (int i = 0; i < 2; i++)
		if (mmap(ring + (size_t)i * size, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory, 0) == MAP_FAILED)
			fatal("map a ring of %zu bytes: %s", size, strerror(errno));
	close(memory);
	return ring;
}

void port_init(struct port *port, const char *name, int fd, size_t max_payload)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	port->name = name;
	port->fd = fd;
	port->size = (PORT_HIGH_WATER + HEADER_SIZE + max_payload + URGENT_ROOM + page) / page * page;
	port->ring = map_twice(port->size);
	port->late_last = &port->late_first;
	pthread_mutex_init(&port->lock, NULL);
	pthread_cond_init(&port->space, NULL);
	uint8_t *buffer = malloc(HEADER_SIZE + max_payload);
	if (!buffer)
		fatal("allocate the input buffer of port %s: out of memory", name);
	decoder_init(&port->decoder, buffer, HEADER_SIZE + max_payload);
}

/* Out. All of it under the lock. */

static void write_ring(struct port *port)
{
	while (port->used) {
		ssize_t count = write(port->fd, port->ring + port->head, port->used);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0 && errno != EAGAIN)
			fatal("write to port %s: %s", port->name, strerror(errno));
		if (count <= 0)
			break;
		port->used -= (size_t)count;
		port->head = port->used ? (port->head + (size_t)count) % port->size : 0; /* empty: reuse the first pages */
	}
}

static void append(struct port *port, const void *bytes, size_t size)
{
	if (size)
		memcpy(port->ring + (port->head + port->used) % port->size, bytes, size);
	port->used += size;
}

static bool fits(const struct port *port, size_t size)
{
	return size + URGENT_ROOM <= port->size - port->used;
}

static void move_late_frame(struct port *port)
{
	struct late_frame *late = port->late_first;
	port->late_first = late->next;
	if (!late->next)
		port->late_last = &port->late_first;
	port->late_bytes -= late->size;
	append(port, late->bytes, late->size);
	free(late);
}

static void flush(struct port *port)
{
	write_ring(port);
	while (!port->held && port->late_first && fits(port, port->late_first->size)) {
		move_late_frame(port);
		write_ring(port);
	}
	bool waiting = port->used > 0;
	if (waiting != port->waiting && port->loop) {
		port->waiting = waiting;
		loop_change(port->loop, port->fd, &port->source, waiting ? EPOLLIN | EPOLLOUT : EPOLLIN);
	}
	if (port->used < PORT_HIGH_WATER && !port->held)
		pthread_cond_broadcast(&port->space);
}

static void append_late(struct port *port, const uint8_t *header, const void *payload, size_t length)
{
	port->late_bytes += HEADER_SIZE + length;
	struct late_frame *late = malloc(sizeof(*late) + HEADER_SIZE + length);
	if (!late || port->late_bytes > MAX_LATE_BYTES)
		fatal("keep a frame for port %s: %zu bytes wait for the host already", port->name, port->late_bytes);
	late->next = NULL;
	late->size = HEADER_SIZE + length;
	memcpy(late->bytes, header, HEADER_SIZE);
	if (length)
		memcpy(late->bytes + HEADER_SIZE, payload, length);
	*port->late_last = late;
	port->late_last = &late->next;
}

static void queue(struct port *port, bool urgent, const uint8_t *header, const void *payload, size_t length)
{
	if (!urgent && (port->held || port->late_first || !fits(port, HEADER_SIZE + length))) {
		append_late(port, header, payload, length);
	} else {
		if (HEADER_SIZE + length > port->size - port->used)
			fatal("the host asks port %s for answers and reads none", port->name);
		append(port, header, HEADER_SIZE);
		append(port, payload, length);
	}
	flush(port);
}

void port_send(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, size_t length)
{
	uint8_t header[HEADER_SIZE];
	encode_header(header, type, channel, stream, (uint32_t)length);
	pthread_mutex_lock(&port->lock);
	queue(port, false, header, payload, length);
	pthread_mutex_unlock(&port->lock);
}

void port_send_urgent(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload,
		      size_t length)
{
	uint8_t header[HEADER_SIZE];
	encode_header(header, type, channel, stream, (uint32_t)length);
	pthread_mutex_lock(&port->lock);
	queue(port, true, header, payload, length);
	pthread_mutex_unlock(&port->lock);
}

static bool has_room(const struct port *port)
{
	return !port->held && !port->late_first && port->used < PORT_HIGH_WATER;
}

/* Returns with the lock. */
static void wait_room(struct port *port)
{
	pthread_mutex_lock(&port->lock);
	while (!has_room(port))
		pthread_cond_wait(&port->space, &port->lock);
}

void port_send_wait(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, size_t length)
{
	uint8_t header[HEADER_SIZE];
	encode_header(header, type, channel, stream, (uint32_t)length);
	wait_room(port);
	queue(port, false, header, payload, length);
	pthread_mutex_unlock(&port->lock);
}

void port_send_late(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, size_t length)
{
	uint8_t header[HEADER_SIZE];
	encode_header(header, type, channel, stream, (uint32_t)length);
	wait_room(port); /* below the mark there is room for the largest frame: see port_init */
	append(port, header, HEADER_SIZE);
	append(port, payload, length);
	if (port->used >= PORT_HIGH_WATER / 2)
		flush(port);
	pthread_mutex_unlock(&port->lock);
}

void port_flush(struct port *port)
{
	pthread_mutex_lock(&port->lock);
	flush(port);
	pthread_mutex_unlock(&port->lock);
}

uint8_t *port_lend(struct port *port, size_t length)
{
	pthread_mutex_lock(&port->lock);
	if (has_room(port) && fits(port, HEADER_SIZE + length))
		return port->ring + (port->head + port->used) % port->size + HEADER_SIZE;
	pthread_mutex_unlock(&port->lock);
	return NULL;
}

void port_commit(struct port *port, uint8_t type, uint8_t channel, uint32_t stream, size_t length)
{
	if (length) {
		uint8_t *header = port->ring + (port->head + port->used) % port->size;
		encode_header(header, type, channel, stream, (uint32_t)length);
		port->used += HEADER_SIZE + length;
		flush(port);
	}
	pthread_mutex_unlock(&port->lock);
}

/* Rest. */

void port_hold(struct port *port)
{
	uint8_t header[HEADER_SIZE];
	encode_header(header, FRAME_QUIESCED, 0, 0, 0);
	pthread_mutex_lock(&port->lock);
	port->held = true;
	queue(port, true, header, NULL, 0);
	pthread_mutex_unlock(&port->lock);
}

void port_release(struct port *port)
{
	pthread_mutex_lock(&port->lock);
	port->held = false;
	flush(port);
	pthread_mutex_unlock(&port->lock);
	if (port->room)
		port->room();
}

/* In. */

static void read_frames(struct port *port)
{
	for (;;) {
		size_t room;
		uint8_t *space = decoder_space(&port->decoder, &room);
		ssize_t count = read(port->fd, space, room);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0 && errno != EAGAIN)
			fatal("read from port %s: %s", port->name, strerror(errno));
		if (count <= 0)
			return; /* 0: the host is not connected */
		decoder_filled(&port->decoder, (size_t)count);
		struct frame frame;
		enum decoder_result result;
		while ((result = decoder_next(&port->decoder, &frame)) == FRAME_READY)
			port->take(&frame);
		if (result == FRAME_BROKEN)
			fatal("protocol error on port %s: %s", port->name, port->decoder.error);
	}
}

static void port_ready(struct source *source, uint32_t events)
{
	struct port *port = container_of(source, struct port, source);
	if (events & EPOLLOUT) {
		pthread_mutex_lock(&port->lock);
		flush(port);
		bool room = has_room(port);
		pthread_mutex_unlock(&port->lock);
		if (room && port->room)
			port->room();
	}
	if (events & EPOLLIN)
		read_frames(port);
}

void port_attach(struct port *port, struct loop *loop, void (*take)(const struct frame *), void (*room)(void))
{
	port->take = take;
	port->room = room;
	port->source.ready = port_ready;
	pthread_mutex_lock(&port->lock);
	port->loop = loop;
	port->waiting = port->used > 0;
	loop_add(loop, port->fd, &port->source, port->waiting ? EPOLLIN | EPOLLOUT : EPOLLIN);
	pthread_mutex_unlock(&port->lock);
}
