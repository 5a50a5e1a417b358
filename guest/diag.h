/* The messages of linux/inet_diag.h that name one TCP socket, and its cgroup in the answer. No system calls; fuzzed by tests/fuzz.c. */
#ifndef TASKVM_DIAG_H
#define TASKVM_DIAG_H

#include <stddef.h>
#include <stdint.h>

/* linux/netlink.h: struct nlmsghdr */
struct diag_header {
	uint32_t length;
	uint16_t type, flags;
	uint32_t sequence, port;
};

/* struct inet_diag_sockid. Ports and addresses in network order; only the first word of an address is IPv4's. */
struct diag_socket {
	uint16_t source_port, port;
	uint32_t source[4], address[4];
	uint32_t interface, cookie[2];
};

/* struct inet_diag_req_v2 */
struct diag_question {
	struct diag_header header;
	uint8_t family, protocol, extensions, padding;
	uint32_t states;
	struct diag_socket socket;
};

/* Ask for the one IPv4 socket that has this source and this peer, as they are in a sockaddr_in. */
struct diag_question diag_ask(uint32_t sequence, uint32_t source, uint16_t source_port, uint32_t address, uint16_t port);
/* The number of the cgroup that made the socket; 0 when the bytes are no answer to the question, or do not say. */
uint64_t diag_cgroup(const void *bytes, size_t length, const struct diag_question *question);

#endif
