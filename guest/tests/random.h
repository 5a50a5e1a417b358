/* Random numbers that a seed repeats, and requests of the host with random fields and broken bytes. */
#ifndef TASKVM_RANDOM_H
#define TASKVM_RANDOM_H

#include <string.h>

#include "../msgpack.h"
#include "check.h"

static uint64_t random_state;

static inline void random_begin(uint64_t seed)
{
	random_state = seed;
}

static inline uint32_t random_number(uint32_t below) /* splitmix64 */
{
	uint64_t z = random_state += 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return (uint32_t)((z ^ z >> 31) % below);
}

static inline void fill(uint8_t *bytes, size_t length)
{
	for (size_t i = 0; i < length; i++)
		bytes[i] = (uint8_t)random_number(256);
}

/* Numbers at the borders of every type that they are read into. */
static inline int64_t random_integer(void)
{
	static const int64_t BORDERS[] = {0, 1, -1, 64, 65, 255, 65535, 65536, INT32_MAX, UINT32_MAX, (int64_t)UINT32_MAX + 1,
		INT64_MAX, INT64_MIN};
	return random_number(2) ? (int64_t)random_number(1000) : BORDERS[random_number(sizeof(BORDERS) / sizeof(BORDERS[0]))];
}

static inline void put_integer(struct msgpack_writer *map, const char *key, int64_t value)
{
	msgpack_write_string(map, key);
	msgpack_write_integer(map, value);
}

static inline void put_strings(struct msgpack_writer *map, const char *key, const char *first, uint32_t count)
{
	msgpack_write_string(map, key);
	map->bytes[map->length++] = (uint8_t)(0x90 | count); /* at most 15, and there is room: the caller's buffer is large */
	for (uint32_t i = 0; i < count; i++)
		msgpack_write_bytes(map, first, strlen(first) - (i ? random_number((uint32_t)strlen(first)) : 0));
}

/* An OPEN of exec with every field that it may have. Returns its length. */
static inline size_t random_exec(uint8_t *bytes, size_t capacity)
{
	struct msgpack_writer map = {.bytes = bytes, .capacity = capacity};
	bool terminal = !random_number(3), limits = !random_number(3);
	msgpack_write_map(&map, 7 + terminal + limits);
	msgpack_write_string(&map, "op");
	msgpack_write_string(&map, "exec");
	put_strings(&map, "argv", random_number(2) ? "cat" : "true", random_number(16));
	put_strings(&map, "env", "NAME=value", random_number(16));
	msgpack_write_string(&map, "cwd");
	msgpack_write_bytes(&map, "/some/where", random_number(12));
	put_integer(&map, "uid", random_number(8) ? 0 : random_integer());
	put_integer(&map, "gid", random_number(8) ? 0 : random_integer());
	msgpack_write_string(&map, "groups");
	uint32_t groups = random_number(16);
	bytes[map.length++] = (uint8_t)(0x90 | groups);
	while (groups--)
		msgpack_write_integer(&map, random_number(1000));
	if (terminal) {
		msgpack_write_string(&map, "pty");
		msgpack_write_map(&map, 2);
		put_integer(&map, "rows", random_integer());
		put_integer(&map, "cols", random_integer());
	}
	if (limits) {
		msgpack_write_string(&map, "limits");
		msgpack_write_map(&map, 3);
		put_integer(&map, "memory", random_integer());
		put_integer(&map, "cpu_us", random_integer());
		put_integer(&map, "disk_read", random_integer());
	}
	CHECK(!map.overflow);
	return map.length;
}

/* An OPEN of anything else. "poweroff" is not among them: `fuzz_control` links what it does. */
static inline size_t random_request(uint8_t *bytes, size_t capacity)
{
	static const char *const NAMES[] = {"read", "write", "stat", "list", "mkdir", "rename", "remove", "chmod", "symlink", "readlink",
		"mount", "unmount", "renew", "settle", "watch", "grow", "sync", "identity", "ping", "nonsense", ""};
	struct msgpack_writer map = {.bytes = bytes, .capacity = capacity};
	msgpack_write_map(&map, 3);
	msgpack_write_string(&map, "op");
	msgpack_write_string(&map, NAMES[random_number(sizeof(NAMES) / sizeof(NAMES[0]))]);
	msgpack_write_string(&map, "path");
	msgpack_write_bytes(&map, "/some/where", random_number(12));
	put_integer(&map, "a", random_integer());
	CHECK(!map.overflow);
	return map.length;
}

/* Break up to three bytes, often none, and sometimes cut the end off. Returns the length that is left. */
static inline size_t mutated(uint8_t *bytes, size_t length)
{
	for (uint32_t changes = random_number(4); changes; changes--)
		bytes[random_number((uint32_t)length)] = (uint8_t)random_number(256);
	return random_number(4) ? length : random_number((uint32_t)length + 1);
}

#endif
