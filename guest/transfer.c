/* Operations beside the control loop, and the credit of their flows. */
#include "transfer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "kernel.h"
#include "log.h"

/* The control thread's side. */

static void take_data(struct transfer *transfer, const struct frame *frame)
{
	if (frame->channel != CHANNEL_STDIN || transfer->ended)
		protocol_error(frame, transfer->ended ? "DATA after END" : "no such input channel");
	if (frame->length > transfer->window)
		protocol_error(frame, "more DATA than credit");
	if (!transfer->bytes)
		transfer->bytes = malloc(INITIAL_CREDIT);
	if (!transfer->bytes)
		fatal("keep the input of operation %u: out of memory", transfer->stream.id);
	memmove(transfer->bytes, transfer->bytes + transfer->start, transfer->length);
	transfer->start = 0;
	memcpy(transfer->bytes + transfer->length, frame->payload, frame->length); /* fits: the window is the buffer */
	transfer->length += frame->length;
	transfer->window -= frame->length;
}

static void wake(struct transfer *transfer)
{
	const uint64_t one = 1;
	if (transfer->wake >= 0 && write(transfer->wake, &one, sizeof(one)) < 0)
		fatal("write to an eventfd: %s", strerror(errno));
}

static void take_frame(struct stream *stream, const struct frame *frame)
{
	struct transfer *transfer = container_of(stream, struct transfer, stream);
	pthread_mutex_lock(&transfer->lock);
	switch (frame->type) {
	case FRAME_DATA: take_data(transfer, frame); break;
	case FRAME_END: transfer->ended = true; break;
	case FRAME_RESET:
		transfer->reset = true;
		wake(transfer);
		break;
	case FRAME_CREDIT:
		transfer->credit += decode_u32(frame->payload);
		if (transfer->credit > INT32_MAX)
			protocol_error(frame, "credit overflow");
		break;
	default: protocol_error(frame, "no frame for a file operation");
	}
	pthread_cond_signal(&transfer->changed);
	pthread_mutex_unlock(&transfer->lock);
}

static void run_job(struct job *job)
{
	struct transfer *transfer = container_of(job, struct transfer, job);
	transfer->run(transfer);
}

static void finish_job(struct job *job)
{
	struct transfer *transfer = container_of(job, struct transfer, job);
	stream_remove(&transfer->stream);
	pthread_cond_destroy(&transfer->changed);
	pthread_mutex_destroy(&transfer->lock);
	if (transfer->wake >= 0)
		close(transfer->wake);
	free(transfer->bytes);
	free(transfer->request);
	free(transfer);
}

void transfer_open(struct request *request, struct pool *pool, void (*run)(struct transfer *), bool urgent)
{
	struct transfer *transfer = calloc(1, sizeof(*transfer));
	if (!transfer) {
		reply_failure(request->stream, &(struct failure){ENOMEM, "malloc"});
		free(request);
		return;
	}
	transfer->stream = (struct stream){.id = request->stream, .take = take_frame};
	transfer->job.run = run_job;
	transfer->job.done = finish_job;
	transfer->request = request;
	transfer->run = run;
	transfer->urgent = urgent;
	transfer->wake = -1;
	transfer->credit = transfer->window = INITIAL_CREDIT;
	pthread_mutex_init(&transfer->lock, NULL);
	pthread_cond_init(&transfer->changed, NULL);
	stream_add(&transfer->stream);
	pool_submit(pool, &transfer->job);
}

/* The operation's side. */

static bool was_reset(struct transfer *transfer)
{
	pthread_mutex_lock(&transfer->lock);
	bool reset = transfer->reset;
	pthread_mutex_unlock(&transfer->lock);
	return reset;
}

void transfer_reply(struct transfer *transfer, const struct msgpack_writer *map)
{
	if (was_reset(transfer))
		return;
	if (transfer->urgent)
		port_send_urgent(&control_port, FRAME_REPLY, 0, transfer->stream.id, map->bytes, map->length);
	else
		reply_map(transfer->stream.id, map);
}

void transfer_done(struct transfer *transfer)
{
	uint8_t empty[1];
	struct msgpack_writer map = {.bytes = empty, .capacity = sizeof(empty)};
	msgpack_write_map(&map, 0);
	transfer_reply(transfer, &map);
}

void transfer_fail(struct transfer *transfer, const struct failure *failure)
{
	uint8_t bytes[128];
	struct msgpack_writer map = {.bytes = bytes, .capacity = sizeof(bytes)};
	write_failure(&map, failure);
	transfer_reply(transfer, &map);
}

void transfer_abort(struct transfer *transfer, int error)
{
	if (!was_reset(transfer))
		send_u32(FRAME_RESET, 0, transfer->stream.id, (uint32_t)error);
}

bool transfer_send(struct transfer *transfer, const uint8_t *bytes, size_t length)
{
	while (length) {
		pthread_mutex_lock(&transfer->lock);
		while (!transfer->credit && !transfer->reset)
			pthread_cond_wait(&transfer->changed, &transfer->lock);
		size_t size = length < MAX_DATA ? length : MAX_DATA;
		if ((int64_t)size > transfer->credit)
			size = (size_t)transfer->credit;
		transfer->credit -= (int64_t)size;
		bool reset = transfer->reset;
		pthread_mutex_unlock(&transfer->lock);
		if (reset)
			return false;
		port_send_wait(&control_port, FRAME_DATA, CHANNEL_STDOUT, transfer->stream.id, bytes, size);
		bytes += size;
		length -= size;
	}
	return true;
}

void transfer_end(struct transfer *transfer)
{
	if (!was_reset(transfer))
		port_send(&control_port, FRAME_END, CHANNEL_STDOUT, transfer->stream.id, NULL, 0);
}

ssize_t transfer_receive(struct transfer *transfer, uint8_t *bytes, size_t size)
{
	pthread_mutex_lock(&transfer->lock);
	while (!transfer->length && !transfer->ended && !transfer->reset)
		pthread_cond_wait(&transfer->changed, &transfer->lock);
	ssize_t taken = transfer->reset ? -1 : (ssize_t)(size < transfer->length ? size : transfer->length);
	uint32_t grant = 0;
	if (taken > 0) {
		memcpy(bytes, transfer->bytes + transfer->start, (size_t)taken);
		transfer->start += (size_t)taken;
		transfer->length -= (size_t)taken;
		transfer->owed += (uint32_t)taken;
		if (transfer->owed >= INITIAL_CREDIT / 2 && !transfer->ended) {
			grant = transfer->owed;
			transfer->window += grant;
			transfer->owed = 0;
		}
	}
	pthread_mutex_unlock(&transfer->lock);
	if (grant)
		send_u32(FRAME_CREDIT, CHANNEL_STDIN, transfer->stream.id, grant);
	return taken;
}

int transfer_wake(struct transfer *transfer)
{
	pthread_mutex_lock(&transfer->lock);
	transfer->wake = eventfd(transfer->reset, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_unlock(&transfer->lock);
	return transfer->wake;
}
