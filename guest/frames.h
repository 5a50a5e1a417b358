/* The frame codec of the three ports: bytes in, frames out. No system calls; fuzzed by tests/fuzz.c.
 *
 * Rule 1: a length is checked before anything waits for that many bytes.
 * Rule 2: whatever bytes come, decoder_next answers FRAME_MORE, FRAME_READY or FRAME_BROKEN; after the last, nothing else.
 */
#ifndef TASKVM_FRAMES_H
#define TASKVM_FRAMES_H

#include <stddef.h>
#include <stdint.h>

#include "limits.h"

struct frame {
	uint8_t type, channel;
	uint32_t stream, length;
	const uint8_t *payload; /* into the decoder's buffer: valid until the next decoder_space */
};

enum decoder_result { FRAME_MORE, FRAME_READY, FRAME_BROKEN };

struct decoder {
	uint8_t *buffer;
	size_t capacity, start, end;
	const char *error; /* why the bytes are not frames */
};

/* `buffer` must hold HEADER_SIZE + the largest payload that may come; a longer frame is an error. */
void decoder_init(struct decoder *decoder, uint8_t *buffer, size_t capacity);
/* Where the next bytes go, and how many fit: never 0 after decoder_next has said FRAME_MORE. */
uint8_t *decoder_space(struct decoder *decoder, size_t *room);
void decoder_filled(struct decoder *decoder, size_t count);
enum decoder_result decoder_next(struct decoder *decoder, struct frame *frame);

void encode_header(uint8_t header[HEADER_SIZE], uint8_t type, uint8_t channel, uint32_t stream, uint32_t length);
void encode_u32(uint8_t bytes[4], uint32_t value);
uint32_t decode_u32(const uint8_t *bytes);

#endif
