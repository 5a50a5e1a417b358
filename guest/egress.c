/* The way out, and the bytes of the way in (docs/protocol-control.md, The net port). One thread does all of it.
 *
 * A connection that an nftables rule redirected here carries its original destination (SO_ORIGINAL_DST); the host judges it. One that
 * was made straight to this port has none and is refused. A connection that the host opens goes to the loopback (ingress.c); once it
 * stands, nothing tells the two kinds apart. Memory is bounded: MAX_CONNECTIONS windows of INITIAL_CREDIT towards the
 * guest, nothing but the port's ring towards the host.
 */
#include "egress.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "control.h"
#include "ingress.h"
#include "kernel.h"
#include "log.h"
#include "msgpack.h"
#include "origin.h"
#include "pool.h"
#include "port.h"

enum { MAX_CONNECTIONS = 1024, BUCKETS = 1024, BACKLOG = 1024, MAX_QUERIES = 256 };

struct connection {
	struct source source;
	struct connection *next;        /* in its bucket, or among the ended */
	struct connection *next_waiting; /* for room in the port */
	uint32_t id;
	int fd;
	bool readable, waiting;
	bool sent_end, got_end, closed;
	uint16_t dialling; /* the port of the loopback that the host asked for, until it is reached */
	int family;
	int64_t credit;
	uint8_t *bytes; /* what the program has not taken yet; INITIAL_CREDIT of room, made when first needed */
	size_t start, length;
	uint32_t window, owed;
};

static struct port net_port;
static struct loop net_loop;
static struct connection *buckets[BUCKETS], *ended;
static struct connection *waiting_first, **waiting_last = &waiting_first;
static unsigned count;
static uint32_t last_id;

static struct source listener_source, query_source;
static int listener, queries;
static struct query {
	uint32_t id;
	struct sockaddr_in from;
} asked[MAX_QUERIES];

/* Connections. */

static struct connection **place_of(uint32_t id)
{
	struct connection **link = &buckets[id % BUCKETS];
	while (*link && (*link)->id != id)
		link = &(*link)->next;
	return link;
}

static uint32_t new_id(void)
{
	do
		last_id = (last_id + 1) | GUEST_STREAM_BIT;
	while (*place_of(last_id));
	return last_id;
}

static void send_frame(uint8_t type, uint32_t id, const void *payload, size_t length)
{
	port_send(&net_port, type, 0, id, payload, length);
}

static void send_number(uint8_t type, uint32_t id, uint32_t value)
{
	uint8_t bytes[4];
	encode_u32(bytes, value);
	send_frame(type, id, bytes, sizeof(bytes));
}

static void close_hard(int fd)
{
	const struct linger reset = {.l_onoff = 1, .l_linger = 0};
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(fd);
}

static void end_connection(struct connection *connection, bool hard)
{
	struct connection **link = place_of(connection->id);
	*link = connection->next;
	connection->closed = true;
	loop_remove(&net_loop, connection->fd);
	if (hard)
		close_hard(connection->fd);
	else
		close(connection->fd);
	count--;
	connection->next = ended;
	ended = connection;
}

/* The program, or the kernel on its behalf, broke it off. */
static void reset_connection(struct connection *connection, int error)
{
	send_number(FRAME_RESET, connection->id, (uint32_t)error);
	end_connection(connection, true);
}

static void settle(void)
{
	struct connection **link = &ended;
	while (*link) {
		struct connection *connection = *link;
		if (connection->waiting) { /* still in the queue for room, which forgets it there */
			link = &connection->next;
			continue;
		}
		*link = connection->next;
		free(connection->bytes);
		free(connection);
	}
}

static bool end_if_done(struct connection *connection)
{
	if (!connection->sent_end || !connection->got_end || connection->length)
		return false;
	end_connection(connection, false);
	return true;
}

/* Guest to host. */

static void wait_for_room(struct connection *connection)
{
	if (connection->waiting)
		return;
	connection->waiting = true;
	connection->next_waiting = NULL;
	*waiting_last = connection;
	waiting_last = &connection->next_waiting;
}

static void pump_out(struct connection *connection)
{
	while (!connection->closed && connection->readable && connection->credit && !connection->sent_end) {
		size_t size = connection->credit < MAX_DATA ? (size_t)connection->credit : MAX_DATA;
		uint8_t *place = port_lend(&net_port, size);
		if (!place) {
			wait_for_room(connection);
			return;
		}
		ssize_t length = recv(connection->fd, place, size, 0);
		int error = errno;
		port_commit(&net_port, FRAME_DATA, 0, connection->id, length > 0 ? (size_t)length : 0);
		if (length > 0) {
			connection->credit -= length;
		} else if (length == 0) {
			connection->sent_end = true;
			send_frame(FRAME_END, connection->id, NULL, 0);
			end_if_done(connection);
		} else if (error == EAGAIN) {
			connection->readable = false;
		} else {
			reset_connection(connection, error);
		}
	}
}

static void resume_waiting(void)
{
	struct connection *connection = waiting_first;
	waiting_first = NULL;
	waiting_last = &waiting_first;
	while (connection) {
		struct connection *next = connection->next_waiting;
		connection->waiting = false;
		pump_out(connection); /* without room it queues itself again, in the same order */
		connection = next;
	}
}

/* Host to guest. */

static void grant(struct connection *connection)
{
	if (connection->owed < INITIAL_CREDIT / 2 || connection->got_end)
		return;
	send_number(FRAME_CREDIT, connection->id, connection->owed);
	connection->window += connection->owed;
	connection->owed = 0;
}

/* Write as much as the program's socket takes; -1 when the connection broke and was ended. */
static ssize_t write_out(struct connection *connection, const uint8_t *bytes, size_t length)
{
	size_t written = 0;
	while (written < length) {
		ssize_t part = send(connection->fd, bytes + written, length - written, MSG_NOSIGNAL);
		if (part < 0 && errno == EAGAIN)
			break;
		if (part < 0) {
			reset_connection(connection, errno);
			return -1;
		}
		written += (size_t)part;
	}
	connection->owed += (uint32_t)written;
	return (ssize_t)written;
}

static void finish_in(struct connection *connection)
{
	if (connection->length || !connection->got_end || connection->dialling)
		return;
	shutdown(connection->fd, SHUT_WR);
	end_if_done(connection);
}

static void pump_in(struct connection *connection)
{
	ssize_t written = write_out(connection, connection->bytes + connection->start, connection->length);
	if (written < 0)
		return;
	connection->start += (size_t)written;
	connection->length -= (size_t)written;
	grant(connection);
	finish_in(connection);
}

static _Noreturn void refuse(const struct frame *frame, const char *reason)
{
	fatal("protocol error on port %s: %s (type %u, stream %u, channel %u, %u bytes)", net_port.name, reason, frame->type,
	      frame->stream, frame->channel, frame->length);
}

static void keep(struct connection *connection, const uint8_t *bytes, size_t length)
{
	if (!connection->bytes)
		connection->bytes = malloc(INITIAL_CREDIT);
	if (!connection->bytes)
		fatal("keep the data of a connection: out of memory");
	memmove(connection->bytes, connection->bytes + connection->start, connection->length);
	connection->start = 0;
	memcpy(connection->bytes + connection->length, bytes, length); /* fits: the window is as large as the buffer */
	connection->length += length;
}

static void take_data(struct connection *connection, const struct frame *frame)
{
	if (frame->channel || connection->got_end)
		refuse(frame, frame->channel ? "no such channel" : "DATA after END");
	if (frame->length > connection->window)
		refuse(frame, "more DATA than credit");
	connection->window -= frame->length;
	ssize_t written = connection->length ? 0 : write_out(connection, frame->payload, frame->length);
	if (written < 0)
		return;
	if ((size_t)written < frame->length)
		keep(connection, frame->payload + written, frame->length - (size_t)written);
	grant(connection);
}

static void take_end(struct connection *connection)
{
	connection->got_end = true;
	finish_in(connection);
}

static void take_credit(struct connection *connection, const struct frame *frame)
{
	connection->credit += decode_u32(frame->payload);
	if (connection->credit > INT32_MAX)
		refuse(frame, "credit overflow");
	pump_out(connection);
}

static void take_answer(const struct frame *frame)
{
	const struct query *query = &asked[frame->stream % MAX_QUERIES];
	if (query->id == frame->stream)
		sendto(queries, frame->payload, frame->length, MSG_DONTWAIT | MSG_NOSIGNAL,
		       (const struct sockaddr *)&query->from, sizeof(query->from));
}

static void take_port_frame(const struct frame *frame)
{
	if (frame->type == FRAME_QUIESCE)
		port_hold(&net_port);
	else if (frame->type == FRAME_RESUME)
		port_release(&net_port);
	else
		refuse(frame, "no frame for the port itself");
}

/* Connections that the host opens. */

static void answer_open(uint32_t id, const struct failure *failure)
{
	uint8_t bytes[64];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	if (failure->call)
		write_failure(&map, failure);
	else
		msgpack_write_map(&map, 0);
	send_frame(FRAME_REPLY, id, map.bytes, map.length);
}

static void connection_ready(struct source *source, uint32_t events);

static void enter(struct connection *connection)
{
	connection->source.ready = connection_ready;
	connection->credit = connection->window = INITIAL_CREDIT;
	struct connection **bucket = &buckets[connection->id % BUCKETS];
	connection->next = *bucket;
	*bucket = connection;
	count++;
}

static void watch(struct connection *connection)
{
	loop_add(&net_loop, connection->fd, &connection->source, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
}

static struct connection *make_inward(const struct frame *frame, struct failure *failure)
{
	uint16_t port = ingress_port(frame, failure);
	if (!port)
		return NULL;
	struct connection *connection = count < MAX_CONNECTIONS ? calloc(1, sizeof(*connection)) : NULL;
	if (!connection) {
		fail_call(failure, EAGAIN, "limit");
		return NULL;
	}
	connection->id = frame->stream;
	connection->dialling = port;
	connection->family = AF_INET;
	connection->fd = ingress_dial(AF_INET, port);
	if (connection->fd >= 0)
		return connection;
	fail_call(failure, errno, "connect");
	free(connection);
	return NULL;
}

static void take_open(const struct frame *frame)
{
	if (frame->stream & GUEST_STREAM_BIT || *place_of(frame->stream))
		refuse(frame, "OPEN of a stream that is not free");
	struct failure failure = {0};
	struct connection *connection = make_inward(frame, &failure);
	if (!connection) {
		answer_open(frame->stream, &failure);
		return;
	}
	enter(connection);
	watch(connection);
}

/* Nobody listens on 127.0.0.1, but somebody may on ::1. */
static void dial_again(struct connection *connection, int error)
{
	int fd = -1;
	if (error == ECONNREFUSED && connection->family == AF_INET)
		fd = ingress_dial(AF_INET6, connection->dialling);
	if (fd < 0) {
		answer_open(connection->id, &(struct failure){error, "connect"});
		end_connection(connection, true);
		return;
	}
	loop_remove(&net_loop, connection->fd);
	close(connection->fd);
	connection->fd = fd;
	connection->family = AF_INET6;
	watch(connection);
}

static void take_frame(const struct frame *frame)
{
	if (frame->stream == 0) {
		take_port_frame(frame);
		return;
	}
	if (frame->type == FRAME_DATAGRAM) {
		take_answer(frame);
		return;
	}
	if (frame->type == FRAME_OPEN) {
		take_open(frame);
		return;
	}
	struct connection *connection = *place_of(frame->stream);
	if (!connection)
		return; /* it ended while the frame was under way */
	switch (frame->type) {
	case FRAME_REPLY: break; /* that the host agreed shows in its data; programs saw connect() succeed long ago */
	case FRAME_DATA: take_data(connection, frame); break;
	case FRAME_END: take_end(connection); break;
	case FRAME_CREDIT: take_credit(connection, frame); break;
	case FRAME_RESET: end_connection(connection, true); break;
	default: refuse(frame, "no frame for a connection");
	}
}

/* New connections. */

static void connection_ready(struct source *source, uint32_t events)
{
	struct connection *connection = container_of(source, struct connection, source);
	if (connection->closed)
		return;
	int error = 0;
	socklen_t size = sizeof(error);
	if (events & EPOLLERR && getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error) {
		if (connection->dialling)
			dial_again(connection, error);
		else
			reset_connection(connection, error);
		return;
	}
	if (connection->dialling && events & EPOLLOUT) {
		connection->dialling = 0;
		answer_open(connection->id, &(struct failure){0});
		finish_in(connection);
	}
	if (events & EPOLLOUT && connection->length)
		pump_in(connection);
	if (!connection->closed && events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
		connection->readable = true;
		pump_out(connection);
	}
}

/* Where the program wanted to go. False for one that came straight to us. */
static bool original_destination(int fd, struct sockaddr_in *address)
{
	socklen_t length = sizeof(*address);
	if (getsockopt(fd, IPPROTO_IP, ORIGINAL_DESTINATION, address, &length) < 0 || address->sin_family != AF_INET)
		return false;
	return address->sin_port != htons(EGRESS_PORT) || ntohl(address->sin_addr.s_addr) >> 24 != 127;
}

static void send_open(uint32_t id, const struct sockaddr_in *address, uint32_t exec)
{
	uint8_t bytes[96];
	char text[INET_ADDRSTRLEN];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	msgpack_write_map(&map, exec ? 4 : 3);
	msgpack_write_string(&map, "op");
	msgpack_write_string(&map, "connect");
	msgpack_write_string(&map, "addr");
	msgpack_write_string(&map, inet_ntop(AF_INET, &address->sin_addr, text, sizeof(text)));
	msgpack_write_string(&map, "port");
	msgpack_write_integer(&map, ntohs(address->sin_port));
	if (exec) {
		msgpack_write_string(&map, "exec");
		msgpack_write_integer(&map, exec);
	}
	send_frame(FRAME_OPEN, id, map.bytes, map.length);
}

static void add_connection(int fd)
{
	struct sockaddr_in address;
	const int now = 1;
	struct connection *connection = NULL;
	if (count < MAX_CONNECTIONS && original_destination(fd, &address))
		connection = calloc(1, sizeof(*connection));
	if (!connection) {
		close_hard(fd);
		return;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &now, sizeof(now)); /* the host has already chosen the pieces */
	connection->id = new_id();
	connection->fd = fd;
	enter(connection);
	send_open(connection->id, &address, origin_exec(fd, &address));
	watch(connection);
}

static void listener_ready(struct source *source, uint32_t events)
{
	(void)source, (void)events;
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd >= 0)
			add_connection(fd);
		else if (errno != ECONNABORTED && errno != EINTR)
			return;
	}
}

/* DNS. */

static void queries_ready(struct source *source, uint32_t events)
{
	(void)source, (void)events;
	for (;;) {
		struct sockaddr_in from = {0};
		socklen_t size = sizeof(from);
		uint8_t *place = port_lend(&net_port, MAX_DATAGRAM + 1);
		if (!place)
			return;
		ssize_t length = recvfrom(queries, place, MAX_DATAGRAM + 1, 0, (struct sockaddr *)&from, &size);
		bool whole = length > 0 && length <= MAX_DATAGRAM;
		uint32_t id = whole ? new_id() : 0;
		port_commit(&net_port, FRAME_DATAGRAM, 0, id, whole ? (size_t)length : 0);
		if (length < 0)
			return;
		if (whole)
			asked[id % MAX_QUERIES] = (struct query){id, from};
	}
}

static void port_has_room(void)
{
	resume_waiting();
	queries_ready(NULL, 0);
}

static int bind_loopback(int type)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(EGRESS_PORT)};
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK); /* not any: the answers to DNS queries would come from elsewhere */
	int fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		fatal("bind 127.0.0.1 port %d: %s", EGRESS_PORT, strerror(errno));
	return fd;
}

static void *serve(void *unused)
{
	(void)unused;
	loop_run(&net_loop);
}

void egress_start(int fd)
{
	port_init(&net_port, PORT_NET, fd, MAX_DATA);
	loop_init(&net_loop, settle);
	origin_init();
	listener = bind_loopback(SOCK_STREAM);
	if (listen(listener, BACKLOG) < 0)
		fatal("listen on 127.0.0.1 port %d: %s", EGRESS_PORT, strerror(errno));
	queries = bind_loopback(SOCK_DGRAM);
	listener_source.ready = listener_ready;
	query_source.ready = queries_ready;
	loop_add(&net_loop, listener, &listener_source, EPOLLIN);
	loop_add(&net_loop, queries, &query_source, EPOLLIN);
	port_attach(&net_port, &net_loop, take_frame, port_has_room);
	int error = thread_start(serve, NULL);
	if (error)
		fatal("start the thread of port %s: %s", net_port.name, strerror(error));
}
