/* Where a connection of the host may go, and how it gets there. egress.c carries its bytes, as those of every connection. */
#include "ingress.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "msgpack.h"

#define LOOPBACK "127.0.0.1"

static bool is_text(const struct msgpack_value *value, const char *text)
{
	return value->type == MSGPACK_BYTES && value->length == strlen(text) && memcmp(value->bytes, text, value->length) == 0;
}

uint16_t ingress_port(const struct frame *frame, struct failure *failure)
{
	struct msgpack_value op, address, port;
	if (!msgpack_valid(frame->payload, frame->length)) {
		fail_call(failure, EINVAL, "map");
	} else if (!msgpack_find(frame->payload, frame->length, "op", &op) || !is_text(&op, "connect")) {
		fail_call(failure, ENOSYS, "op");
	} else if (!msgpack_find(frame->payload, frame->length, "addr", &address) || !is_text(&address, LOOPBACK)) {
		fail_call(failure, EINVAL, "addr");
	} else if (!msgpack_find(frame->payload, frame->length, "port", &port) || port.type != MSGPACK_INTEGER ||
		   port.integer < 1 || port.integer > UINT16_MAX) {
		fail_call(failure, EINVAL, "port");
	} else {
		return (uint16_t)port.integer;
	}
	return 0;
}

/* A connect that does not block is never decided before it returns: the answer waits for the socket's lock. */
static bool begin(int fd, int family, uint16_t port)
{
	const struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	const struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	const struct sockaddr *address = family == AF_INET6 ? (const void *)&six : (const void *)&four;
	return connect(fd, address, family == AF_INET6 ? sizeof(six) : sizeof(four)) == 0 || errno == EINPROGRESS;
}

int ingress_dial(int family, uint16_t port)
{
	const int now = 1;
	int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &now, sizeof(now));
	if (begin(fd, family, port))
		return fd;
	int error = errno;
	close(fd);
	errno = error;
	return -1;
}
