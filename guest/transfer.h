/* One operation that runs in a thread of a pool: its request, its answer, and its flow of bytes with credit.
 *
 * The thread owns the operation; the control thread only adds bytes, credit and the news of a RESET, under the lock.
 */
#ifndef TASKVM_TRANSFER_H
#define TASKVM_TRANSFER_H

#include <pthread.h>

#include "control.h"
#include "pool.h"

struct transfer {
	struct stream stream;
	struct job job;
	struct request *request;
	void (*run)(struct transfer *transfer);
	bool urgent; /* answered even while the port is held */

	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool reset, ended;
	int wake; /* an eventfd that a RESET makes readable, or -1 */
	int64_t credit;
	uint8_t *bytes; /* what came and was not received yet; INITIAL_CREDIT of room */
	size_t start, length;
	uint32_t window, owed;
};

/* Begin; takes the request. */
void transfer_open(struct request *request, struct pool *pool, void (*run)(struct transfer *), bool urgent);

/* For `run`. Each answers once: transfer_reply, transfer_done or transfer_fail. */
void transfer_reply(struct transfer *transfer, const struct msgpack_writer *map);
void transfer_done(struct transfer *transfer);
void transfer_fail(struct transfer *transfer, const struct failure *failure);
/* Send on channel 1, waiting for credit. False when the host has reset the stream. */
bool transfer_send(struct transfer *transfer, const uint8_t *bytes, size_t length);
void transfer_end(struct transfer *transfer);
/* Give up after the reply. */
void transfer_abort(struct transfer *transfer, int error);
/* Receive what came on channel 0: its length, 0 at END, -1 when the host has reset the stream. */
ssize_t transfer_receive(struct transfer *transfer, uint8_t *bytes, size_t size);
/* A descriptor that is readable once the host has reset the stream, for an operation that waits by poll; -1 when there is none. */
int transfer_wake(struct transfer *transfer);

#endif
