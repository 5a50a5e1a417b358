/* The frame codec of the three ports (docs/protocol-control.md, Frames). */
#include "frames.h"

#include <string.h>

/* The least and the most payload a type may carry. */
static const struct bounds {
	uint32_t least, most;
} BOUNDS[] = {
	[FRAME_OPEN] = {1, MAX_MAP},
	[FRAME_REPLY] = {1, MAX_MAP},
	[FRAME_DATA] = {1, MAX_DATA},
	[FRAME_CREDIT] = {4, 4},
	[FRAME_END] = {0, 0},
	[FRAME_RESET] = {4, 4},
	[FRAME_SIGNAL] = {1, MAX_MAP},
	[FRAME_EXIT] = {1, MAX_MAP},
	[FRAME_HELLO] = {1, MAX_MAP},
	[FRAME_DATAGRAM] = {1, MAX_DATAGRAM},
	[FRAME_QUIESCE] = {0, 0},
	[FRAME_QUIESCED] = {0, 0},
	[FRAME_RESUME] = {0, 0},
	[FRAME_FUSE] = {16, MAX_PAYLOAD},
};

void encode_u32(uint8_t bytes[4], uint32_t value)
{
	for (int i = 0; i < 4; i++)
		bytes[i] = (uint8_t)(value >> 8 * i);
}

uint32_t decode_u32(const uint8_t *bytes)
{
	return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

void encode_header(uint8_t header[HEADER_SIZE], uint8_t type, uint8_t channel, uint32_t stream, uint32_t length)
{
	encode_u32(header, length);
	header[4] = type;
	header[5] = channel;
	header[6] = header[7] = 0;
	encode_u32(header + 8, stream);
}

void decoder_init(struct decoder *decoder, uint8_t *buffer, size_t capacity)
{
	*decoder = (struct decoder){.buffer = buffer, .capacity = capacity};
}

uint8_t *decoder_space(struct decoder *decoder, size_t *room)
{
	size_t held = decoder->end - decoder->start;
	size_t wanted = HEADER_SIZE;
	if (held >= HEADER_SIZE)
		wanted += decode_u32(decoder->buffer + decoder->start);
	/* Move only when the frame would not fit behind: a frame that began at 0 is never moved. */
	if (decoder->start && (!held || wanted > decoder->capacity - decoder->start)) {
		memmove(decoder->buffer, decoder->buffer + decoder->start, held);
		decoder->start = 0;
		decoder->end = held;
	}
	*room = decoder->capacity - decoder->end;
	return decoder->buffer + decoder->end;
}

void decoder_filled(struct decoder *decoder, size_t count)
{
	decoder->end += count;
}

static const char *refuse(const struct decoder *decoder, const uint8_t *header)
{
	uint32_t length = decode_u32(header);
	uint8_t type = header[4];
	if (type >= sizeof(BOUNDS) / sizeof(BOUNDS[0]) || type == 0)
		return "no such frame type";
	if (length < BOUNDS[type].least || length > BOUNDS[type].most || length > decoder->capacity - HEADER_SIZE)
		return "a frame of that length is not allowed";
	if (header[6] || header[7])
		return "the reserved field is not 0";
	return NULL;
}

enum decoder_result decoder_next(struct decoder *decoder, struct frame *frame)
{
	if (decoder->error)
		return FRAME_BROKEN;
	size_t held = decoder->end - decoder->start;
	if (held < HEADER_SIZE)
		return FRAME_MORE;
	const uint8_t *header = decoder->buffer + decoder->start;
	decoder->error = refuse(decoder, header);
	if (decoder->error)
		return FRAME_BROKEN;
	frame->length = decode_u32(header);
	if (held - HEADER_SIZE < frame->length)
		return FRAME_MORE;
	frame->type = header[4];
	frame->channel = header[5];
	frame->stream = decode_u32(header + 8);
	frame->payload = header + HEADER_SIZE;
	decoder->start += HEADER_SIZE + frame->length;
	return FRAME_READY;
}
