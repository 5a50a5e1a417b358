/* Random and mutated bytes against the decoders, under the address and undefined-behaviour sanitizers: `fuzz [ROUNDS [SEED]]`.
 *
 * Every piece of input lies in an allocation of exactly its size, so that the sanitizer sees one byte too many. */
#include <string.h>

#include "../counters.h"
#include "../diag.h"
#include "../frames.h"
#include "../msgpack.h"
#include "../program.h"
#include "../pty.h"
#include "check.h"
#include "random.h"

static long programs; /* that were accepted: a fuzzer whose every input is refused proves nothing */

/* Walk a map as the agent does; only what msgpack_valid has accepted may be walked. */
static void fuzz_map(const uint8_t *bytes, size_t length)
{
	static const char *const KEYS[] = {"op", "path", "a", ""};
	uint8_t *copy = malloc(length ? length : 1);
	struct msgpack_value value;
	memcpy(copy, bytes, length);
	bool valid = msgpack_valid(copy, length);
	for (size_t i = 0; valid && i < sizeof(KEYS) / sizeof(KEYS[0]); i++)
		if (msgpack_find(copy, length, KEYS[i], &value) && value.type == MSGPACK_BYTES)
			CHECK(value.bytes >= copy && value.bytes + value.length <= copy + length);
	free(copy);
}

/* A file of the kernel's with broken bytes: a number comes out, and nothing behind the text is read. */
static void fuzz_counters(void)
{
	static const char TEXT[] = "254:0 rbytes=188416 wbytes=99999999999999999999\nuser_usec 152084\noom_kill 0\n";
	static const char *const NAMES[] = {"rbytes", "wbytes", "user_usec", "oom_kill", ""};
	size_t length = random_number(sizeof(TEXT));
	char *text = malloc(length + 1);
	memcpy(text, TEXT, length);
	for (uint32_t changes = length ? random_number(4) : 0; changes; changes--)
		text[random_number((uint32_t)length)] = (char)random_number(256);
	text[length] = 0;
	for (size_t i = 0; i < sizeof(NAMES) / sizeof(NAMES[0]); i++)
		CHECK(counter_sum(text, NAMES[i]) >= 0);
	free(text);
}

/* An answer of sock_diag with broken bytes and any length: nothing behind it is read. */
static void fuzz_diag(void)
{
	const struct diag_question question = diag_ask(1, 2, 3, 4, 5);
	size_t length = random_number(160);
	uint8_t *answer = malloc(length ? length : 1);
	fill(answer, length);
	if (length >= 24 + sizeof(question.socket)) {
		const uint32_t header[3] = {random_number((uint32_t)length + 4), 20, question.header.sequence};
		memcpy(answer, header, sizeof(header));
		memcpy(answer + 20, &question.socket, sizeof(question.socket));
	}
	for (size_t at = 88; at + 4 <= length; at += 12) { /* attributes of about the right sizes */
		const uint16_t attribute[2] = {(uint16_t)random_number(16), (uint16_t)(20 + random_number(2))};
		memcpy(answer + at, attribute, sizeof(attribute));
	}
	uint64_t cgroup = diag_cgroup(answer, length, &question);
	CHECK(!cgroup || length >= 88 + 12);
	free(answer);
}

static struct request *copy_request(const uint8_t *map, size_t length)
{
	const struct frame frame = {.payload = map, .length = (uint32_t)length};
	return request_copy(&frame);
}

/* A request as the control thread keeps it: every reader stays within it, and what is read is what was promised. */
static void fuzz_request(const uint8_t *bytes, size_t length)
{
	static const char *const KEYS[] = {"op", "path", "cwd", "argv", "uid", "merge", "pty", "limits", ""};
	uint8_t *copy = malloc(length ? length : 1); /* of exactly its size: a request's own memory ends with its map */
	memcpy(copy, bytes, length);
	struct request *request = msgpack_valid(copy, length) ? copy_request(copy, length) : NULL;
	free(copy);
	for (size_t i = 0; request && i < sizeof(KEYS) / sizeof(KEYS[0]); i++) {
		struct failure failure = {0};
		char path[PATH_MAX];
		size_t part;
		bool found = request_path(request, KEYS[i], path, &failure);
		CHECK(found ? strlen(path) > 0 : failure.error && failure.call);
		int64_t flag = request_flag(request, KEYS[i], false);
		CHECK(flag == 0 || flag == 1);
		request_integer(request, KEYS[i], 0);
		const uint8_t *map = request_map(request, KEYS[i], &part);
		struct winsize size;
		CHECK(!map || (map >= request->map && map + part <= request->map + length));
		if (map)
			pty_read_size(map, part, &size);
	}
	free(request);
}

static void fuzz_program(const uint8_t *bytes, size_t length)
{
	struct failure failure = {0};
	struct program *program = malloc(sizeof(*program));
	struct request *request = msgpack_valid(bytes, length) ? copy_request(bytes, length) : NULL;
	if (request && program_read(program, request, &failure)) {
		size_t text = 0;
		CHECK(program->argv[0][0] && program->cwd[0] && program->group_count <= PROGRAM_MAX_GROUPS);
		CHECK(program->uid != UINT32_MAX && program->gid != UINT32_MAX);
		for (char **each = program->argv; *each; each++)
			text += strlen(*each);
		for (char **each = program->env; *each; each++)
			text += strlen(*each);
		CHECK(text <= length);
		programs++;
	} else if (request) {
		CHECK(failure.error && failure.call);
	}
	if (request)
		program_free(program);
	free(request);
	free(program);
}

/* Frames with some broken bits, cut into random pieces: the decoder keeps its invariants and its verdict. */
static void fuzz_frames(size_t capacity)
{
	uint8_t *buffer = malloc(capacity), piece[512];
	struct decoder decoder;
	decoder_init(&decoder, buffer, capacity);
	bool broken = false;
	for (int i = 0; i < 64 && !broken; i++) {
		size_t length = random_number(sizeof(piece) - HEADER_SIZE), at = 0;
		fill(piece, sizeof(piece));
		encode_header(piece, (uint8_t)random_number(16), 0, random_number(8), (uint32_t)length);
		if (!random_number(16))
			piece[random_number(HEADER_SIZE)] = (uint8_t)random_number(256);
		length += HEADER_SIZE;
		while (at < length && !broken) {
			struct frame frame;
			size_t room;
			uint8_t *space = decoder_space(&decoder, &room);
			CHECK(room > 0 && space >= buffer && space + room <= buffer + capacity);
			size_t size = 1 + random_number((uint32_t)(length - at));
			size = size < room ? size : room;
			memcpy(space, piece + at, size);
			decoder_filled(&decoder, size);
			at += size;
			enum decoder_result result;
			while ((result = decoder_next(&decoder, &frame)) == FRAME_READY) {
				CHECK(frame.payload >= buffer && frame.payload + frame.length <= buffer + capacity);
				fuzz_map(frame.payload, frame.length);
			}
			broken = result == FRAME_BROKEN;
			CHECK(!broken || decoder_next(&decoder, &frame) == FRAME_BROKEN);
		}
	}
	free(buffer);
}

int main(int count, char **arguments)
{
	long rounds = count > 1 ? strtol(arguments[1], NULL, 10) : 20000;
	random_begin(count > 2 ? strtoull(arguments[2], NULL, 10) : 1);
	for (long i = 0; i < rounds; i++) {
		uint8_t bytes[1024];
		size_t length = random_number(64);
		fill(bytes, length);
		bytes[0] = (uint8_t)(0x80 | random_number(16)); /* random bytes that begin as a map */
		fuzz_map(bytes, length);
		fuzz_request(bytes, length);
		length = mutated(bytes, random_request(bytes, sizeof(bytes)));
		fuzz_map(bytes, length);
		fuzz_request(bytes, length);
		length = mutated(bytes, random_exec(bytes, sizeof(bytes)));
		fuzz_request(bytes, length);
		fuzz_program(bytes, length);
		fuzz_counters();
		fuzz_diag();
		fuzz_frames(HEADER_SIZE + 64 + random_number(1024));
	}
	CHECK(programs > rounds / 100);
	printf("ok fuzz: %ld rounds, %ld programs\n", rounds, programs);
	return 0;
}
