/* What a request says of a program to start, field by field. */
#include "../program.h"

#include <errno.h>
#include <string.h>

#include "../pty.h"
#include "check.h"

static struct program program;
static struct failure failure;

/* The maps are written by hand: {"argv": […], …} as the host encodes them. */
static bool reads(const char *map, size_t length)
{
	const struct frame frame = {.payload = (const uint8_t *)map, .length = (uint32_t)length};
	struct request *request = request_copy(&frame);
	CHECK(msgpack_valid(request->map, request->length));
	failure = (struct failure){0};
	bool read = program_read(&program, request, &failure);
	free(request);
	return read;
}

#define READS(map) reads(map, sizeof(map) - 1)
#define ARGV "\xa4" "argv" "\x92\xc4\x02" "ls" "\xc4\x02" "-l"
#define ENV "\xa3" "env" "\x91\xc4\x03" "A=b"
#define CWD "\xa3" "cwd" "\xc4\x01" "/"
#define USER "\xa3" "uid" "\x05" "\xa3" "gid" "\xce\xff\xff\xff\xfe"

static void every_field_is_read(void)
{
	CHECK(READS("\x86" ARGV ENV CWD USER "\xa6" "groups" "\x92\x01\x02"));
	CHECK(!strcmp(program.argv[0], "ls") && !strcmp(program.argv[1], "-l") && !program.argv[2]);
	CHECK(!strcmp(program.env[0], "A=b") && !program.env[1] && !strcmp(program.cwd, "/"));
	CHECK(program.uid == 5 && program.gid == UINT32_MAX - 1);
	CHECK(program.group_count == 2 && program.groups[1] == 2);
	program_free(&program);
}

static void what_is_missing_is_named(void)
{
	CHECK(!READS("\x84" ARGV ENV USER) && failure.error == EINVAL && !strcmp(failure.call, "cwd"));
	program_free(&program);
	CHECK(!READS("\x84" ENV CWD USER) && !strcmp(failure.call, "argv"));
	program_free(&program);
	CHECK(!READS("\x84" ARGV CWD USER) && !strcmp(failure.call, "env"));
	program_free(&program); /* argv was read */
}

static void minus_one_is_no_user(void)
{
	CHECK(!READS("\x85" ARGV ENV CWD "\xa3" "uid" "\xce\xff\xff\xff\xff" "\xa3" "gid" "\x05") && !strcmp(failure.call, "uid"));
	CHECK(!READS("\x85" ARGV ENV CWD "\xa3" "uid" "\x05" "\xa3" "gid" "\xff") && !strcmp(failure.call, "gid"));
}

static void a_nul_within_a_string_is_refused(void)
{
	CHECK(!READS("\x85" "\xa4" "argv" "\x91\xc4\x03" "a\0b" ENV CWD USER) && !strcmp(failure.call, "argv"));
	CHECK(!READS("\x85" ARGV "\xa3" "env" "\x91\xc4\x02" "\0b" CWD USER) && !strcmp(failure.call, "env"));
	program_free(&program);
	CHECK(!READS("\x85" ARGV ENV "\xa3" "cwd" "\xc4\x02" "/\0" USER) && !strcmp(failure.call, "cwd"));
}

static void a_program_has_a_name(void)
{
	CHECK(!READS("\x85" "\xa4" "argv" "\x90" ENV CWD USER) && !strcmp(failure.call, "argv"));
	program_free(&program);
	CHECK(!READS("\x85" "\xa4" "argv" "\x91\xc4\x00" ENV CWD USER) && !strcmp(failure.call, "argv"));
	program_free(&program);
}

static void more_groups_than_fit_are_refused(void)
{
	char map[512] = "\x86" ARGV ENV CWD USER "\xa6" "groups" "\xdc\x00";
	size_t length = sizeof("\x86" ARGV ENV CWD USER "\xa6" "groups" "\xdc\x00") - 1;
	map[length] = PROGRAM_MAX_GROUPS + 1; /* zeros follow, each a number */
	CHECK(!reads(map, length + 1 + PROGRAM_MAX_GROUPS + 1) && !strcmp(failure.call, "groups"));
	map[length] = PROGRAM_MAX_GROUPS;
	CHECK(reads(map, length + 1 + PROGRAM_MAX_GROUPS) && program.group_count == PROGRAM_MAX_GROUPS);
	program_free(&program);
}

static void a_terminals_size_is_two_small_numbers(void)
{
	struct winsize size;
#define SIZE(map) pty_read_size((const uint8_t *)(map), sizeof(map) - 1, &size)
	CHECK(SIZE("\x82" "\xa4" "rows" "\x18" "\xa4" "cols" "\x50") && size.ws_row == 24 && size.ws_col == 80);
	CHECK(SIZE("\x82" "\xa4" "rows" "\xcd\xff\xff" "\xa4" "cols" "\x00") && size.ws_row == UINT16_MAX);
	CHECK(!SIZE("\x82" "\xa4" "rows" "\xce\x00\x01\x00\x00" "\xa4" "cols" "\x50"));
	CHECK(!SIZE("\x82" "\xa4" "rows" "\x18" "\xa4" "cols" "\xff"));
	CHECK(!SIZE("\x81" "\xa4" "rows" "\x18"));
}

int main(void)
{
	RUN(every_field_is_read);
	RUN(what_is_missing_is_named);
	RUN(minus_one_is_no_user);
	RUN(a_nul_within_a_string_is_refused);
	RUN(a_program_has_a_name);
	RUN(more_groups_than_fit_are_refused);
	RUN(a_terminals_size_is_two_small_numbers);
	return 0;
}
