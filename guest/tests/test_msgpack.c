/* What the msgpack reader and writer promise: msgpack.h. */
#include <string.h>

#include "../msgpack.h"
#include "check.h"

#define VALID(...) msgpack_valid((const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

static struct msgpack_value read_one(const uint8_t *bytes, size_t length)
{
	struct msgpack_reader reader = {bytes, bytes + length};
	struct msgpack_value value;
	CHECK(msgpack_read(&reader, &value));
	return value;
}

#define READ(...) read_one((const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

static void every_width_of_integer_is_read(void)
{
	CHECK(READ(0x7f).integer == 127);
	CHECK(READ(0xff).integer == -1);
	CHECK(READ(0xcc, 0xff).integer == 255);
	CHECK(READ(0xcd, 0x01, 0x00).integer == 256);
	CHECK(READ(0xce, 0xff, 0xff, 0xff, 0xff).integer == UINT32_MAX);
	CHECK(READ(0xcf, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff).integer == INT64_MAX);
	CHECK(READ(0xd0, 0x80).integer == -128);
	CHECK(READ(0xd1, 0xff, 0x00).integer == -256);
	CHECK(READ(0xd2, 0x80, 0, 0, 0).integer == INT32_MIN);
	CHECK(READ(0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0).integer == INT64_MIN);
}

static void a_number_beyond_int64_is_no_integer(void)
{
	CHECK(READ(0xcf, 0x80, 0, 0, 0, 0, 0, 0, 0).type == MSGPACK_OTHER);
}

static void str_and_bin_are_both_bytes(void)
{
	CHECK(READ(0xa2, 'h', 'i').type == MSGPACK_BYTES);
	CHECK(READ(0xd9, 2, 'h', 'i').length == 2);
	CHECK(READ(0xc4, 2, 'h', 'i').type == MSGPACK_BYTES);
	CHECK(READ(0xc6, 0, 0, 0, 2, 'h', 'i').length == 2);
}

static void a_key_is_found_among_others(void)
{
	/* {"a": [1, {"op": 2}], "op": "ping", "z": nil}: the inner "op" is not the map's own */
	const uint8_t map[] = {0x83, 0xa1, 'a', 0x92, 1, 0x81, 0xa2, 'o', 'p', 2, 0xa2, 'o', 'p',
			       0xa4, 'p', 'i', 'n', 'g', 0xa1, 'z', 0xc0};
	struct msgpack_value value;
	CHECK(msgpack_valid(map, sizeof(map)));

	CHECK(msgpack_find(map, sizeof(map), "op", &value));

	CHECK(value.type == MSGPACK_BYTES && value.length == 4 && !memcmp(value.bytes, "ping", 4));
	CHECK(!msgpack_find(map, sizeof(map), "o", &value));
	CHECK(!msgpack_find(map, sizeof(map), "opp", &value));
}

static void only_one_whole_map_is_valid(void)
{
	CHECK(VALID(0x80));
	CHECK(!VALID(0x90));             /* an array */
	CHECK(!VALID(0x80, 0x80));       /* something behind it */
	CHECK(!VALID(0x81, 0xa1, 'a'));  /* a value is missing */
	CHECK(!VALID(0x81, 0xa1));       /* cut in a string */
	CHECK(!VALID(0xc1));
	CHECK(!msgpack_valid((const uint8_t *)"", 0));
}

static void a_length_that_the_bytes_cannot_hold_is_refused(void)
{
	CHECK(!VALID(0xdf, 0xff, 0xff, 0xff, 0xff));
	CHECK(!VALID(0x81, 0xa1, 'a', 0xdd, 0xff, 0xff, 0xff, 0xff));
	CHECK(!VALID(0x81, 0xa1, 'a', 0xc6, 0xff, 0xff, 0xff, 0xff, 0));
	CHECK(!VALID(0x81, 0xa1, 'a', 0xdb, 0x7f, 0xff, 0xff, 0xff, 0));
}

static void four_levels_are_allowed_and_five_are_not(void)
{
	CHECK(VALID(0x81, 0xa1, 'a', 0x91, 0x91, 0x91, 1));
	CHECK(!VALID(0x81, 0xa1, 'a', 0x91, 0x91, 0x91, 0x91, 1));
}

static void what_is_written_is_read_back(void)
{
	static const int64_t NUMBERS[] = {0, 1, 127, 128, 255, 65536, INT64_MAX, -1, -33, INT64_MIN};
	for (size_t i = 0; i < sizeof(NUMBERS) / sizeof(NUMBERS[0]); i++) {
		uint8_t bytes[128];
		struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
		struct msgpack_value value;
		msgpack_write_map(&map, 3);
		msgpack_write_string(&map, "a key of more than thirty-one bytes");
		msgpack_write_integer(&map, NUMBERS[i]);
		msgpack_write_string(&map, "data");
		msgpack_write_bytes(&map, "\0\1\2", 3);
		msgpack_write_string(&map, "s");
		msgpack_write_string(&map, "text");

		CHECK(!map.overflow && msgpack_valid(bytes, map.length));
		CHECK(msgpack_find(bytes, map.length, "a key of more than thirty-one bytes", &value));
		CHECK(value.type == MSGPACK_INTEGER && value.integer == NUMBERS[i]);
		CHECK(msgpack_find(bytes, map.length, "data", &value) && !memcmp(value.bytes, "\0\1\2", 3));
	}
}

static void a_full_buffer_is_never_overrun(void)
{
	uint8_t bytes[8] = {0};
	struct msgpack_writer map = {.bytes = bytes, .capacity = 7};

	msgpack_write_map(&map, 1);
	msgpack_write_string(&map, "longer than seven");

	CHECK(map.overflow && map.length <= 7 && bytes[7] == 0);
}

int main(void)
{
	RUN(every_width_of_integer_is_read);
	RUN(a_number_beyond_int64_is_no_integer);
	RUN(str_and_bin_are_both_bytes);
	RUN(a_key_is_found_among_others);
	RUN(only_one_whole_map_is_valid);
	RUN(a_length_that_the_bytes_cannot_hold_is_refused);
	RUN(four_levels_are_allowed_and_five_are_not);
	RUN(what_is_written_is_read_back);
	RUN(a_full_buffer_is_never_overrun);
	return 0;
}
