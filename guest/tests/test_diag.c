/* What sock_diag is asked and what it answers (linux/inet_diag.h). */
#include "../diag.h"

#include <string.h>

#include "check.h"

enum { ANSWER = 16 + 72, CGROUP_ID = 21 };

static uint8_t bytes[256];
static size_t length;
static struct diag_question question;

static void put_attribute(uint16_t type, const void *value, uint16_t size)
{
	const uint16_t header[2] = {(uint16_t)(4 + size), type};
	memcpy(bytes + length, header, sizeof(header));
	memcpy(bytes + length + 4, value, size);
	length += (4 + size + 3u) & ~3u;
	memcpy(bytes, &(uint32_t){(uint32_t)length}, 4);
}

/* The kernel's answer: the question's socket, an attribute that nobody asked for, and the cgroup. */
static void begin(void)
{
	static const uint8_t shutdown = 3;
	question = diag_ask(7, 0x0f02000a, 0x1234, 0x010012c6, 0x5000);
	memset(bytes, 0, sizeof(bytes));
	length = ANSWER;
	memcpy(bytes + 4, &(uint16_t){20}, 2);
	memcpy(bytes + 8, &question.header.sequence, 4);
	memcpy(bytes + 16 + 4, &question.socket, sizeof(question.socket));
	put_attribute(8, &shutdown, sizeof(shutdown));
}

static void answer(uint64_t cgroup)
{
	begin();
	put_attribute(CGROUP_ID, &cgroup, sizeof(cgroup));
}

static void a_question_names_one_socket(void)
{
	begin();
	CHECK(question.header.length == 72 && question.header.type == 20 && question.header.flags == 1);
	CHECK(question.family == 2 && question.protocol == 6);
	CHECK(question.socket.source[0] == 0x0f02000a && question.socket.source_port == 0x1234);
	CHECK(question.socket.address[0] == 0x010012c6 && question.socket.port == 0x5000);
	CHECK(question.socket.cookie[0] == UINT32_MAX && question.socket.cookie[1] == UINT32_MAX);
}

static void the_cgroup_is_found_behind_other_attributes(void)
{
	answer(0x1234567890ull);
	CHECK(diag_cgroup(bytes, length, &question) == 0x1234567890ull);
}

static void an_answer_without_a_cgroup_is_none(void)
{
	begin();
	CHECK(diag_cgroup(bytes, length, &question) == 0);
	put_attribute(CGROUP_ID, &(uint32_t){5}, 4); /* too short to be a number of a cgroup */
	CHECK(diag_cgroup(bytes, length, &question) == 0);
}

static void another_sockets_answer_is_none(void)
{
	answer(5);
	bytes[16 + 4 + 2] ^= 1; /* its peer's port: a listener has none */
	CHECK(diag_cgroup(bytes, length, &question) == 0);
	answer(5);
	bytes[8] ^= 1; /* the sequence: an answer of before */
	CHECK(diag_cgroup(bytes, length, &question) == 0);
	answer(5);
	bytes[4] = 2; /* NLMSG_ERROR */
	CHECK(diag_cgroup(bytes, length, &question) == 0);
}

static void a_cut_answer_is_none(void)
{
	answer(5);
	for (size_t cut = 0; cut < length; cut++) {
		uint8_t *copy = malloc(cut ? cut : 1);
		memcpy(copy, bytes, cut);
		CHECK(diag_cgroup(copy, cut, &question) == 0);
		free(copy);
	}
}

int main(void)
{
	RUN(a_question_names_one_socket);
	RUN(the_cgroup_is_found_behind_other_attributes);
	RUN(an_answer_without_a_cgroup_is_none);
	RUN(another_sockets_answer_is_none);
	RUN(a_cut_answer_is_none);
	return 0;
}
