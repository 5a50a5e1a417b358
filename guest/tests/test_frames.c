/* What the frame codec promises: frames.h. */
#include <string.h>

#include "../frames.h"
#include "check.h"

enum { CAPACITY = HEADER_SIZE + MAX_DATA };

static uint8_t buffer[CAPACITY];
static struct decoder decoder;

static void feed(const uint8_t *bytes, size_t length)
{
	while (length) {
		size_t room;
		uint8_t *space = decoder_space(&decoder, &room);
		CHECK(room > 0);
		if (room > length)
			room = length;
		memcpy(space, bytes, room);
		decoder_filled(&decoder, room);
		bytes += room;
		length -= room;
	}
}

static size_t make_frame(uint8_t *bytes, uint8_t type, uint32_t stream, const void *payload, uint32_t length)
{
	encode_header(bytes, type, CHANNEL_STDOUT, stream, length);
	memcpy(bytes + HEADER_SIZE, payload, length);
	return HEADER_SIZE + length;
}

static void expect_broken(uint8_t type, uint32_t length, uint8_t reserved)
{
	uint8_t bytes[HEADER_SIZE];
	struct frame frame;
	encode_header(bytes, type, 0, 1, length);
	bytes[6] = reserved;
	decoder_init(&decoder, buffer, sizeof(buffer));
	feed(bytes, sizeof(bytes));
	CHECK(decoder_next(&decoder, &frame) == FRAME_BROKEN);
	CHECK(decoder_next(&decoder, &frame) == FRAME_BROKEN);
	CHECK(decoder.error != NULL);
}

static void a_header_has_the_layout_of_the_protocol_page(void)
{
	const uint8_t expected[HEADER_SIZE] = {0x04, 0x03, 0x02, 0x01, FRAME_DATA, 2, 0, 0, 0x0d, 0x0c, 0x0b, 0x8a};
	uint8_t header[HEADER_SIZE];

	encode_header(header, FRAME_DATA, 2, 0x8a0b0c0d, 0x01020304);

	CHECK(!memcmp(header, expected, sizeof(header)));
}

static void a_frame_split_at_any_byte_is_the_same_frame(void)
{
	uint8_t bytes[64];
	size_t length = make_frame(bytes, FRAME_DATA, 7, "some bytes", 10);
	for (size_t cut = 0; cut <= length; cut++) {
		struct frame frame;
		decoder_init(&decoder, buffer, sizeof(buffer));

		feed(bytes, cut);
		if (cut < length)
			CHECK(decoder_next(&decoder, &frame) == FRAME_MORE);
		feed(bytes + cut, length - cut);

		CHECK(decoder_next(&decoder, &frame) == FRAME_READY);
		CHECK(frame.type == FRAME_DATA && frame.channel == CHANNEL_STDOUT && frame.stream == 7);
		CHECK(frame.length == 10 && !memcmp(frame.payload, "some bytes", 10));
		CHECK(decoder_next(&decoder, &frame) == FRAME_MORE);
	}
}

static void frames_in_one_piece_come_out_in_order(void)
{
	uint8_t bytes[256];
	size_t length = 0;
	struct frame frame;
	for (uint32_t stream = 1; stream <= 5; stream++)
		length += make_frame(bytes + length, FRAME_DATA, stream, "x", 1);
	decoder_init(&decoder, buffer, sizeof(buffer));

	feed(bytes, length);

	for (uint32_t stream = 1; stream <= 5; stream++) {
		CHECK(decoder_next(&decoder, &frame) == FRAME_READY);
		CHECK(frame.stream == stream);
	}
	CHECK(decoder_next(&decoder, &frame) == FRAME_MORE);
}

static void the_largest_frame_fits_behind_a_small_one(void)
{
	static uint8_t large[HEADER_SIZE + MAX_DATA], payload[MAX_DATA];
	uint8_t small[64];
	struct frame frame;
	memset(payload, 'l', sizeof(payload));
	decoder_init(&decoder, buffer, sizeof(buffer));

	feed(small, make_frame(small, FRAME_DATA, 1, "s", 1));
	size_t length = make_frame(large, FRAME_DATA, 2, payload, sizeof(payload));
	feed(large, 20);
	CHECK(decoder_next(&decoder, &frame) == FRAME_READY && frame.stream == 1);
	CHECK(decoder_next(&decoder, &frame) == FRAME_MORE);
	feed(large + 20, length - 20);

	CHECK(decoder_next(&decoder, &frame) == FRAME_READY);
	CHECK(frame.length == sizeof(payload) && !memcmp(frame.payload, payload, sizeof(payload)));
}

static void what_is_no_frame_is_refused_from_its_header_alone(void)
{
	expect_broken(0, 0, 0);
	expect_broken(15, 0, 0);
	expect_broken(255, 0, 0);
	expect_broken(FRAME_DATA, 0, 0);
	expect_broken(FRAME_DATA, MAX_DATA + 1, 0);
	expect_broken(FRAME_DATA, UINT32_MAX, 0);
	expect_broken(FRAME_OPEN, MAX_MAP, 0); /* more than this decoder's buffer */
	expect_broken(FRAME_FUSE, MAX_PAYLOAD + 1, 0);
	expect_broken(FRAME_FUSE, 15, 0);
	expect_broken(FRAME_CREDIT, 3, 0);
	expect_broken(FRAME_CREDIT, 5, 0);
	expect_broken(FRAME_END, 1, 0);
	expect_broken(FRAME_QUIESCE, 1, 0);
	expect_broken(FRAME_END, 0, 1);
}

int main(void)
{
	RUN(a_header_has_the_layout_of_the_protocol_page);
	RUN(a_frame_split_at_any_byte_is_the_same_frame);
	RUN(frames_in_one_piece_come_out_in_order);
	RUN(the_largest_frame_fits_behind_a_small_one);
	RUN(what_is_no_frame_is_refused_from_its_header_alone);
	return 0;
}
