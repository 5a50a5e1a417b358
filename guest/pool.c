/* Threads for blocking work. A thread, once started, stays: starting one costs more than keeping one. */
#include "pool.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "log.h"

/* Deep enough for the longest path and libc's own needs; nothing in a job recurses over what the guest made. */
enum { STACK_SIZE = 256 * 1024 };

static struct {
	pthread_mutex_t lock;
	int event;
	struct job *first, **last;
	struct source source;
} finished = {.lock = PTHREAD_MUTEX_INITIALIZER, .last = &finished.first};

int thread_start(void *(*run)(void *), void *argument)
{
	pthread_attr_t attributes;
	pthread_t thread;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	int error = pthread_create(&thread, &attributes, run, argument);
	pthread_attr_destroy(&attributes);
	return error;
}

static void deliver(struct source *source, uint32_t events)
{
	(void)source, (void)events;
	uint64_t count;
	if (read(finished.event, &count, sizeof(count)) < 0)
		return;
	pthread_mutex_lock(&finished.lock);
	struct job *job = finished.first;
	finished.first = NULL;
	finished.last = &finished.first;
	pthread_mutex_unlock(&finished.lock);
	while (job) {
		struct job *next = job->next;
		job->done(job);
		job = next;
	}
}

void pool_deliver_to(struct loop *loop)
{
	finished.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (finished.event < 0)
		fatal("eventfd: %s", strerror(errno));
	finished.source.ready = deliver;
	loop_add(loop, finished.event, &finished.source, EPOLLIN);
}

static void finish(struct job *job)
{
	const uint64_t one = 1;
	job->next = NULL;
	pthread_mutex_lock(&finished.lock);
	*finished.last = job;
	finished.last = &job->next;
	pthread_mutex_unlock(&finished.lock);
	if (write(finished.event, &one, sizeof(one)) < 0)
		fatal("write to an eventfd: %s", strerror(errno));
}

static void *work(void *argument)
{
	struct pool *pool = argument;
	pthread_mutex_lock(&pool->lock);
	for (;;) {
		pool->idle++;
		while (!pool->first)
			pthread_cond_wait(&pool->work, &pool->lock);
		pool->idle--;
		struct job *job = pool->first;
		pool->first = job->next;
		if (!pool->first)
			pool->last = &pool->first;
		pthread_mutex_unlock(&pool->lock);
		job->run(job);
		finish(job);
		pthread_mutex_lock(&pool->lock);
	}
	return NULL;
}

void pool_init(struct pool *pool, unsigned limit)
{
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	pool->limit = limit;
	pool->last = &pool->first;
	pool->threads = 1;
	int error = thread_start(work, pool);
	if (error)
		fatal("start a thread: %s", strerror(error));
}

void pool_submit(struct pool *pool, struct job *job)
{
	job->next = NULL;
	pthread_mutex_lock(&pool->lock);
	unsigned queued = 1;
	for (struct job *other = pool->first; other; other = other->next)
		queued++;
	*pool->last = job;
	pool->last = &job->next;
	if (pool->idle < queued && pool->threads < pool->limit && thread_start(work, pool) == 0)
		pool->threads++;
	pthread_cond_signal(&pool->work);
	pthread_mutex_unlock(&pool->lock);
}
