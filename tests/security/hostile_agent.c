/* The guest's agent in the hands of an attacker: as the real one, until it is asked to run "hostile WHAT". */
#define exec_open honest_exec_open
#include "../../guest/exec.c"
#undef exec_open

#include <poll.h>

void exec_open(struct request *request);

/* Around the ring: the host gets just these bytes, whatever the agent's own code would refuse to send. */
static void write_raw(const uint8_t *bytes, size_t length)
{
	while (length) {
		struct pollfd event = {.fd = control_port.fd, .events = POLLOUT};
		poll(&event, 1, -1);
		ssize_t count = write(control_port.fd, bytes, length);
		if (count > 0) {
			bytes += count;
			length -= (size_t)count;
		}
	}
}

static size_t put_frame(uint8_t *place, uint8_t type, uint8_t channel, uint32_t stream, const void *payload, uint32_t length)
{
	encode_header(place, type, channel, stream, length);
	memcpy(place + HEADER_SIZE, payload, length);
	return HEADER_SIZE + length;
}

static _Noreturn void send_forever(uint8_t type, uint8_t channel, uint32_t stream, const void *payload, uint32_t length)
{
	static uint8_t frames[64 * 1024];
	size_t size = 0;
	while (size + HEADER_SIZE + length <= sizeof(frames))
		size += put_frame(frames + size, type, channel, stream, payload, length);
	for (;;)
		write_raw(frames, size);
}

static bool is_asked_for(const struct request *request, const char *what)
{
	struct msgpack_value list, name;
	struct msgpack_reader reader;
	if (!request_find(request, "argv", &list) || list.type != MSGPACK_ARRAY || list.length != 2)
		return false;
	reader = (struct msgpack_reader){list.bytes, request->map + request->length};
	return msgpack_read_whole(&reader, &name) && is_scope(&name, "hostile") && msgpack_read_whole(&reader, &name) &&
	       is_scope(&name, what);
}

void exec_open(struct request *request)
{
	static const uint8_t STARTED[] = {0x81, 0xa3, 'p', 'i', 'd', 7};
	const uint32_t stream = request->stream;
	uint8_t frame[64];
	if (is_asked_for(request, "replay")) {
		for (int i = 0; i < 2; i++)
			write_raw(frame, put_frame(frame, FRAME_REPLY, 0, stream, STARTED, sizeof(STARTED)));
	} else if (is_asked_for(request, "huge")) {
		encode_header(frame, FRAME_REPLY, 0, stream, UINT32_MAX);
		write_raw(frame, HEADER_SIZE);
	} else if (is_asked_for(request, "noise")) {
		send_forever(0xff, 0xff, UINT32_MAX, STARTED, sizeof(STARTED));
	} else if (is_asked_for(request, "half")) {
		encode_header(frame, FRAME_REPLY, 0, stream, MAX_MAP);
		write_raw(frame, HEADER_SIZE + 1);
		for (;;)
			pause();
	} else if (is_asked_for(request, "stall")) {
		for (;;)
			pause();
	} else if (is_asked_for(request, "flood")) {
		write_raw(frame, put_frame(frame, FRAME_REPLY, 0, stream, STARTED, sizeof(STARTED)));
		send_forever(FRAME_END, CHANNEL_STDOUT, stream, "", 0);
	} else if (is_asked_for(request, "pour")) {
		write_raw(frame, put_frame(frame, FRAME_REPLY, 0, stream, STARTED, sizeof(STARTED)));
		send_forever(FRAME_DATA, CHANNEL_STDOUT, stream, STARTED, sizeof(STARTED));
	} else {
		honest_exec_open(request);
		return;
	}
	free(request);
}
