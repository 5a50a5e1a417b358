/* The guest's network, set up once at boot: a dummy eth0 whose packets go nowhere, and one nftables chain (linux/netfilter/nf_tables.h)
 * on the OUTPUT hook that redirects TCP and DNS to the agent. It is convenience, not the border: a guest that removes these rules has
 * no way out at all, because there is no network card.
 */
#include "netlink.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "egress.h"
#include "kernel.h"
#include "log.h"

#define ADDRESS "10.0.2.15"
#define NETMASK "255.255.255.0"
/* Any address that is not the guest's own: what is sent there is redirected to the agent. */
#define NAME_SERVER "10.0.2.3"
enum { MTU = 65535, LOOPBACK_INDEX = 1 };

/* Interfaces. */

static bool interface_call(int sock, unsigned long call, struct ifreq *request, const char *what)
{
	if (ioctl(sock, call, request) == 0)
		return true;
	say("%s of %s: %s", what, request->ifr_name, strerror(errno));
	return false;
}

static bool bring_up(int sock, const char *name)
{
	struct ifreq request = {0};
	strcpy(request.ifr_name, name);
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	return interface_call(sock, SIOCSIFFLAGS, &request, "bring up");
}

static void set_address(struct sockaddr *place, const char *text)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	inet_pton(AF_INET, text, &address.sin_addr);
	memcpy(place, &address, sizeof(address));
}

static bool make_eth0(int sock)
{
	struct ifreq request = {.ifr_name = "dummy0"};
	strcpy(request.ifr_newname, "eth0");
	if (!interface_call(sock, SIOCSIFNAME, &request, "rename"))
		return false;
	memset(&request, 0, sizeof(request));
	strcpy(request.ifr_name, "eth0");
	request.ifr_mtu = MTU;
	if (!interface_call(sock, SIOCSIFMTU, &request, "set the MTU"))
		return false;
	set_address(&request.ifr_addr, ADDRESS);
	if (!interface_call(sock, SIOCSIFADDR, &request, "set the address"))
		return false;
	set_address(&request.ifr_netmask, NETMASK);
	return interface_call(sock, SIOCSIFNETMASK, &request, "set the netmask") && bring_up(sock, "eth0");
}

static bool add_default_route(int sock)
{
	struct rtentry route = {.rt_flags = RTF_UP, .rt_dev = "eth0"};
	set_address(&route.rt_dst, "0.0.0.0");
	set_address(&route.rt_genmask, "0.0.0.0");
	if (ioctl(sock, SIOCADDRT, &route) == 0)
		return true;
	say("add the default route: %s", strerror(errno));
	return false;
}

static void write_setting(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		say("write %s to %s: %s", value, path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

/* nftables. A batch of messages, each a netlink header, an nfgenmsg and nested attributes. */

enum { /* linux/netlink.h, linux/netfilter/nfnetlink.h */
	FLAG_REQUEST = 1, FLAG_ACK = 4, FLAG_CREATE = 0x400, FLAG_APPEND = 0x800,
	BATCH_BEGIN = 0x10, BATCH_END = 0x11, SUBSYSTEM = 10, TYPE_ERROR = 2,
	FAMILY_IPV4 = 2, NESTED = 0x8000,
};
enum { NEW_TABLE = SUBSYSTEM << 8, NEW_CHAIN = SUBSYSTEM << 8 | 3, NEW_RULE = SUBSYSTEM << 8 | 6 };
enum { HOOK_LOCAL_OUT = 3, PRIORITY_DNAT = -100, META_OIF = 5, META_L4PROTO = 16, TRANSPORT_HEADER = 2 };
enum { VERDICT_REGISTER = 0, REGISTER = 1, VERDICT_DROP = 0, VERDICT_ACCEPT = 1 };

#define TABLE "taskvm"
#define CHAIN "output"

struct batch {
	_Alignas(4) uint8_t bytes[2048];
	size_t length, message;
	uint32_t sequence;
};

static void put(struct batch *batch, const void *bytes, size_t length)
{
	if (length)
		memcpy(batch->bytes + batch->length, bytes, length); /* every message is ours: 8 of them, about 900 bytes */
	batch->length += (length + 3) & ~(size_t)3;
}

static void begin_message(struct batch *batch, uint16_t type, uint16_t flags)
{
	bool border = type == BATCH_BEGIN || type == BATCH_END;
	batch->message = batch->length;
	uint32_t header[4] = {0, type | (uint32_t)(flags | FLAG_REQUEST) << 16, ++batch->sequence, 0};
	put(batch, header, sizeof(header));
	const uint8_t family[4] = {border ? 0 : FAMILY_IPV4, 0, 0, border ? SUBSYSTEM : 0};
	put(batch, family, sizeof(family));
}

static void end_message(struct batch *batch)
{
	uint32_t length = (uint32_t)(batch->length - batch->message);
	memcpy(batch->bytes + batch->message, &length, sizeof(length));
}

static void put_attribute(struct batch *batch, uint16_t type, const void *bytes, size_t length)
{
	const uint16_t header[2] = {(uint16_t)(4 + length), type};
	put(batch, header, sizeof(header));
	put(batch, bytes, length);
}

static void put_text(struct batch *batch, uint16_t type, const char *text)
{
	put_attribute(batch, type, text, strlen(text) + 1);
}

static void put_number(struct batch *batch, uint16_t type, uint32_t value)
{
	value = htonl(value);
	put_attribute(batch, type, &value, sizeof(value));
}

static size_t open_nest(struct batch *batch, uint16_t type)
{
	size_t place = batch->length;
	put_attribute(batch, type | NESTED, NULL, 0);
	return place;
}

static void close_nest(struct batch *batch, size_t place)
{
	uint16_t length = (uint16_t)(batch->length - place);
	memcpy(batch->bytes + place, &length, sizeof(length));
}

/* Expressions of a rule: NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA { … } }. */

struct expression {
	size_t element, data;
};

static struct expression open_expression(struct batch *batch, const char *name)
{
	struct expression expression = {.element = open_nest(batch, 1)};
	put_text(batch, 1, name);
	expression.data = open_nest(batch, 2);
	return expression;
}

static void close_expression(struct batch *batch, struct expression expression)
{
	close_nest(batch, expression.data);
	close_nest(batch, expression.element);
}

static void put_meta(struct batch *batch, uint32_t key)
{
	struct expression meta = open_expression(batch, "meta");
	put_number(batch, 1, REGISTER);
	put_number(batch, 2, key);
	close_expression(batch, meta);
}

static void put_destination_port(struct batch *batch)
{
	struct expression payload = open_expression(batch, "payload");
	put_number(batch, 1, REGISTER);
	put_number(batch, 2, TRANSPORT_HEADER);
	put_number(batch, 3, 2);
	put_number(batch, 4, 2);
	close_expression(batch, payload);
}

static void put_compare(struct batch *batch, const void *value, size_t length)
{
	struct expression compare = open_expression(batch, "cmp");
	put_number(batch, 1, REGISTER);
	put_number(batch, 2, 0); /* NFT_CMP_EQ */
	size_t data = open_nest(batch, 3);
	put_attribute(batch, 1, value, length);
	close_nest(batch, data);
	close_expression(batch, compare);
}

static void put_verdict(struct batch *batch, uint32_t verdict)
{
	struct expression immediate = open_expression(batch, "immediate");
	put_number(batch, 1, VERDICT_REGISTER);
	size_t data = open_nest(batch, 2), code = open_nest(batch, 2);
	put_number(batch, 1, verdict);
	close_nest(batch, code);
	close_nest(batch, data);
	close_expression(batch, immediate);
}

static void put_redirect(struct batch *batch)
{
	const uint16_t port = htons(EGRESS_PORT);
	struct expression immediate = open_expression(batch, "immediate");
	put_number(batch, 1, REGISTER);
	size_t data = open_nest(batch, 2);
	put_attribute(batch, 1, &port, sizeof(port));
	close_nest(batch, data);
	close_expression(batch, immediate);
	struct expression redirect = open_expression(batch, "redir");
	put_number(batch, 1, REGISTER);
	close_expression(batch, redirect);
}

static size_t begin_rule(struct batch *batch)
{
	begin_message(batch, NEW_RULE, FLAG_CREATE | FLAG_APPEND | FLAG_ACK);
	put_text(batch, 1, TABLE);
	put_text(batch, 2, CHAIN);
	return open_nest(batch, 4);
}

static void end_rule(struct batch *batch, size_t expressions)
{
	close_nest(batch, expressions);
	end_message(batch);
}

/* oif lo accept: every address of the guest's own, so that its servers work */
static void add_local_rule(struct batch *batch)
{
	const uint32_t loopback = LOOPBACK_INDEX;
	size_t rule = begin_rule(batch);
	put_meta(batch, META_OIF);
	put_compare(batch, &loopback, sizeof(loopback));
	put_verdict(batch, VERDICT_ACCEPT);
	end_rule(batch, rule);
}

/* meta l4proto `protocol` [th dport `port`] redirect to :EGRESS_PORT */
static void add_redirect_rule(struct batch *batch, uint8_t protocol, uint16_t port)
{
	size_t rule = begin_rule(batch);
	put_meta(batch, META_L4PROTO);
	put_compare(batch, &protocol, sizeof(protocol));
	if (port) {
		port = htons(port);
		put_destination_port(batch);
		put_compare(batch, &port, sizeof(port));
	}
	put_redirect(batch);
	end_rule(batch, rule);
}

/* drop: all other UDP and ICMP fails at once with EPERM */
static void add_drop_rule(struct batch *batch)
{
	size_t rule = begin_rule(batch);
	put_verdict(batch, VERDICT_DROP);
	end_rule(batch, rule);
}

static void add_chain(struct batch *batch)
{
	begin_message(batch, NEW_TABLE, FLAG_CREATE | FLAG_ACK);
	put_text(batch, 1, TABLE);
	end_message(batch);
	begin_message(batch, NEW_CHAIN, FLAG_CREATE | FLAG_ACK);
	put_text(batch, 1, TABLE);
	put_text(batch, 3, CHAIN);
	size_t hook = open_nest(batch, 4);
	put_number(batch, 1, HOOK_LOCAL_OUT);
	put_number(batch, 2, (uint32_t)PRIORITY_DNAT);
	close_nest(batch, hook);
	put_text(batch, 7, "nat");
	end_message(batch);
}

/* The kernel answers every message that asked for it, within sendmsg; an error is a negative errno behind its header. */
static bool read_answers(int sock)
{
	_Alignas(4) uint8_t bytes[8192];
	ssize_t length;
	bool good = true;
	while ((length = recv(sock, bytes, sizeof(bytes), MSG_DONTWAIT)) > 0) {
		uint32_t size;
		for (size_t at = 0; at + 20 <= (size_t)length; at += (size + 3) & ~3u) {
			uint16_t type;
			int32_t error;
			memcpy(&size, bytes + at, sizeof(size));
			memcpy(&type, bytes + at + 4, sizeof(type));
			memcpy(&error, bytes + at + 16, sizeof(error));
			if (type == TYPE_ERROR && error) {
				say("add the rules of the network: %s", strerror(-error));
				good = false;
			}
			if (size < 16)
				break;
		}
	}
	return good;
}

static bool add_rules(void)
{
	struct batch batch = {.length = 0};
	begin_message(&batch, BATCH_BEGIN, 0);
	end_message(&batch);
	add_chain(&batch);
	add_local_rule(&batch);
	add_redirect_rule(&batch, IPPROTO_TCP, 0);
	add_redirect_rule(&batch, IPPROTO_UDP, 53);
	add_drop_rule(&batch);
	begin_message(&batch, BATCH_END, 0);
	end_message(&batch);
	int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_FILTER);
	bool good = sock >= 0 && send(sock, batch.bytes, batch.length, 0) == (ssize_t)batch.length;
	if (!good)
		say("send the rules of the network: %s", strerror(errno));
	good = good && read_answers(sock);
	if (sock >= 0)
		close(sock);
	return good;
}

static void write_resolver(void)
{
	static const char TEXT[] = "nameserver " NAME_SERVER "\n";
	unlink("/etc/resolv.conf"); /* some images ship a link into a daemon's directory */
	int fd = open("/etc/resolv.conf", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, TEXT, sizeof(TEXT) - 1) < 0)
		say("write /etc/resolv.conf: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

void network_init(void)
{
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0) {
		say("open a socket: %s", strerror(errno));
		return;
	}
	bool good = bring_up(sock, "lo") && make_eth0(sock) && add_default_route(sock) && add_rules();
	close(sock);
	if (!good) {
		say("the guest has no network");
		return;
	}
	if (access("/proc/sys/net/ipv6", F_OK) == 0)
		write_setting("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1");
	/* 4 096 at 512 MB, and a closed connection stays for two minutes: 34 connections a second would fill it. */
	write_setting("/proc/sys/net/netfilter/nf_conntrack_max", "262144");
	write_resolver();
}
