#include "diag.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

/* linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h */
enum { FLAG_REQUEST = 1, BY_FAMILY = 20, ATTRIBUTE_CGROUP_ID = 21, ATTRIBUTE_HEADER = 4 };

/* struct inet_diag_msg */
struct answer {
	struct diag_header header;
	uint8_t family, state, timer, retransmits;
	struct diag_socket socket;
	uint32_t expires, receive_queue, send_queue, uid, inode;
};

_Static_assert(sizeof(struct diag_question) == 16 + 56, "struct inet_diag_req_v2 behind its header");
_Static_assert(sizeof(struct answer) == 16 + 72, "struct inet_diag_msg behind its header");

struct diag_question diag_ask(uint32_t sequence, uint32_t source, uint16_t source_port, uint32_t address, uint16_t port)
{
	return (struct diag_question){
		.header = {.length = sizeof(struct diag_question), .type = BY_FAMILY, .flags = FLAG_REQUEST, .sequence = sequence},
		.family = AF_INET,
		.protocol = IPPROTO_TCP,
		.socket = {
			.source_port = source_port,
			.port = port,
			.source = {source},
			.address = {address},
			.cookie = {UINT32_MAX, UINT32_MAX}, /* INET_DIAG_NOCOOKIE */
		},
	};
}

/* When the connection is gone, the kernel finds a listener on the source's port, which has no peer. */
static bool is_asked(const struct answer *answer, const struct diag_question *question)
{
	const struct diag_socket *found = &answer->socket, *asked = &question->socket;
	return answer->header.type == BY_FAMILY && answer->header.sequence == question->header.sequence &&
	       found->source_port == asked->source_port && found->port == asked->port;
}

uint64_t diag_cgroup(const void *bytes, size_t length, const struct diag_question *question)
{
	const uint8_t *next = bytes;
	struct answer answer;
	if (length < sizeof(answer))
		return 0;
	memcpy(&answer, bytes, sizeof(answer));
	if (answer.header.length < sizeof(answer) || answer.header.length > length || !is_asked(&answer, question))
		return 0;
	size_t left = answer.header.length - sizeof(answer);
	next += sizeof(answer);
	while (left >= ATTRIBUTE_HEADER) {
		uint16_t size, type;
		uint64_t cgroup;
		memcpy(&size, next, sizeof(size));
		memcpy(&type, next + 2, sizeof(type));
		size_t step = ((size_t)size + 3) & ~(size_t)3;
		if (size < ATTRIBUTE_HEADER || size > left)
			return 0;
		if (type == ATTRIBUTE_CGROUP_ID && size == ATTRIBUTE_HEADER + sizeof(cgroup)) {
			memcpy(&cgroup, next + ATTRIBUTE_HEADER, sizeof(cgroup));
			return cgroup;
		}
		if (step > left)
			return 0;
		next += step;
		left -= step;
	}
	return 0;
}
