/* The epoll loop of the control thread, the fs thread and the net thread. */
#include "loop.h"

#include <errno.h>
#include <string.h>

#include "log.h"

void loop_init(struct loop *loop, void (*settle)(void))
{
	loop->settle = settle;
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (loop->epoll < 0)
		fatal("epoll_create1: %s", strerror(errno));
}

static void control(struct loop *loop, int operation, int fd, struct source *source, uint32_t events)
{
	struct epoll_event event = {.events = events | EPOLLET, .data.ptr = source};
	if (epoll_ctl(loop->epoll, operation, fd, &event) < 0)
		fatal("epoll_ctl of descriptor %d: %s", fd, strerror(errno));
}

void loop_add(struct loop *loop, int fd, struct source *source, uint32_t events)
{
	control(loop, EPOLL_CTL_ADD, fd, source, events);
}

void loop_change(struct loop *loop, int fd, struct source *source, uint32_t events)
{
	control(loop, EPOLL_CTL_MOD, fd, source, events);
}

void loop_remove(struct loop *loop, int fd)
{
	control(loop, EPOLL_CTL_DEL, fd, NULL, 0);
}

_Noreturn void loop_run(struct loop *loop)
{
	struct epoll_event events[64];
	for (;;) {
		int count = epoll_wait(loop->epoll, events, 64, -1);
		if (count < 0 && errno != EINTR)
			fatal("epoll_wait: %s", strerror(errno));
		for (int i = 0; i < count; i++) {
			struct source *source = events[i].data.ptr;
			source->ready(source, events[i].events);
		}
		if (loop->settle)
			loop->settle();
	}
}
