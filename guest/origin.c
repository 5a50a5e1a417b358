/* The client's socket has the cgroup of the process that made it, and sock_diag tells it (INET_DIAG_CGROUP_ID, Linux 5.9): one
 * question per connection, answered within send(). Nothing depends on it: what fails is an origin that is not known. Used by the net
 * thread only. */
#include "origin.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cgroup.h"
#include "diag.h"
#include "kernel.h"
#include "log.h"

static int diagnostics = -1;
static uint32_t sequence;

void origin_init(void)
{
	diagnostics = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_DIAGNOSTICS);
	if (diagnostics < 0)
		say("open sock_diag: %s; no connection's origin is known", strerror(errno));
}

static uint64_t ask(const struct diag_question *question)
{
	_Alignas(8) uint8_t answer[1024]; /* about 300 bytes */
	uint64_t cgroup = 0;
	if (send(diagnostics, question, sizeof(*question), 0) != (ssize_t)sizeof(*question))
		return 0;
	ssize_t length;
	while (!cgroup && (length = recv(diagnostics, answer, sizeof(answer), 0)) > 0)
		cgroup = diag_cgroup(answer, (size_t)length, question);
	return cgroup;
}

uint32_t origin_exec(int fd, const struct sockaddr_in *destination)
{
	struct sockaddr_in source;
	socklen_t size = sizeof(source);
	if (diagnostics < 0 || getpeername(fd, (struct sockaddr *)&source, &size) < 0)
		return 0;
	const struct diag_question question = diag_ask(++sequence, source.sin_addr.s_addr, source.sin_port,
						       destination->sin_addr.s_addr, destination->sin_port);
	uint64_t cgroup = ask(&question);
	return cgroup ? cgroup_owner(cgroup) : 0;
}
