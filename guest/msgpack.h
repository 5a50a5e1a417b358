/* As much msgpack (github.com/msgpack/msgpack spec.md) as the protocol's maps need. No system calls; fuzzed by tests/fuzz.c.
 *
 * Rule 1: a map is checked whole by msgpack_valid before anything is read from it; the readers rely on that.
 * Rule 2: values are views into the map's bytes; nothing is allocated.
 */
#ifndef TASKVM_MSGPACK_H
#define TASKVM_MSGPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MSGPACK_MAX_DEPTH 4

enum msgpack_type { MSGPACK_NIL, MSGPACK_BOOL, MSGPACK_INTEGER, MSGPACK_BYTES, MSGPACK_ARRAY, MSGPACK_MAP, MSGPACK_OTHER };

struct msgpack_value {
	enum msgpack_type type;
	int64_t integer; /* MSGPACK_BOOL: 0 or 1. A number above INT64_MAX is MSGPACK_OTHER. */
	const uint8_t *bytes; /* str and bin alike; of an array or a map: where its first item begins */
	size_t length;        /* of bytes; of an array or a map: how many items or pairs */
};

struct msgpack_reader {
	const uint8_t *next, *end;
};

/* Whether the bytes are exactly one map, well formed, at most MSGPACK_MAX_DEPTH levels deep. */
bool msgpack_valid(const uint8_t *bytes, size_t length);
/* Read one value's head; the items of an array or a map follow. False at a malformed or cut one. */
bool msgpack_read(struct msgpack_reader *reader, struct msgpack_value *value);
/* Read one value and step over all that is in it. */
bool msgpack_read_whole(struct msgpack_reader *reader, struct msgpack_value *value);
/* Find `key` in a valid map. */
bool msgpack_find(const uint8_t *map, size_t length, const char *key, struct msgpack_value *value);

/* A writer into a fixed buffer: what does not fit sets `overflow` and is left out. */
struct msgpack_writer {
	uint8_t *bytes;
	size_t length, capacity;
	bool overflow;
};

void msgpack_write_map(struct msgpack_writer *writer, unsigned pairs); /* at most 15 */
void msgpack_write_string(struct msgpack_writer *writer, const char *text);
void msgpack_write_bytes(struct msgpack_writer *writer, const void *bytes, size_t length);
void msgpack_write_integer(struct msgpack_writer *writer, int64_t value);

#endif
