/* An epoll loop: descriptors with a function each. One thread runs a loop; only that thread may free a source.
 *
 * Sources are edge-triggered: a source reads until EAGAIN, or remembers that there is more. Level-triggered ones would spin on
 * EPOLLHUP, which a pipe without writers and a port whose host is away report for as long as they last.
 */
#ifndef TASKVM_LOOP_H
#define TASKVM_LOOP_H

#include <stdint.h>
#include <sys/epoll.h>

struct source {
	void (*ready)(struct source *source, uint32_t events);
};

struct loop {
	int epoll;
	/* Called after every batch of events: the place to free what they ended. */
	void (*settle)(void);
};

void loop_init(struct loop *loop, void (*settle)(void));
void loop_add(struct loop *loop, int fd, struct source *source, uint32_t events);
void loop_change(struct loop *loop, int fd, struct source *source, uint32_t events);
/* Before close: a program that is being started holds copies of our descriptors, and epoll watches the open file, not the number. */
void loop_remove(struct loop *loop, int fd);
_Noreturn void loop_run(struct loop *loop);

#endif
