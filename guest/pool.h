/* Threads for what may block on a file system, so that the loop that serves the control port never does.
 *
 * A job's `run` is called in a thread of the pool, then its `done` in the control thread, which may free it.
 */
#ifndef TASKVM_POOL_H
#define TASKVM_POOL_H

#include <pthread.h>

#include "loop.h"

struct job {
	void (*run)(struct job *job);
	void (*done)(struct job *job);
	struct job *next;
};

struct pool {
	pthread_mutex_t lock;
	pthread_cond_t work;
	unsigned threads, idle, limit;
	struct job *first, **last;
};

/* Where finished jobs come back; call once, before any pool is used. */
void pool_deliver_to(struct loop *loop);
/* Starts the first thread at once, so that there always is one. */
void pool_init(struct pool *pool, unsigned limit);
/* Hand over a job; it waits when all `limit` threads are busy, or no more can be had. */
void pool_submit(struct pool *pool, struct job *job);
/* Start a detached thread with a small stack; 0 or an errno: a guest may have used up all threads. */
int thread_start(void *(*run)(void *), void *argument);

#endif
