/* The fields of a program to start. Nothing is left to execve that would mean something else there: no NUL within a string, no (uid_t)-1. */
#include "program.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static void *take_room(struct program *program, size_t size)
{
	const size_t place = (program->used + _Alignof(max_align_t) - 1) & ~(_Alignof(max_align_t) - 1);
	if (size > sizeof(program->room) || place > sizeof(program->room) - size)
		return malloc(size);
	program->used = place + size;
	return program->room + place;
}

static void free_strings(const struct program *program, char **strings)
{
	const uintptr_t place = (uintptr_t)strings, room = (uintptr_t)program->room;
	if (place < room || place >= room + sizeof(program->room))
		free(strings);
}

/* An array of byte strings as one block: the pointers, NULL, and the strings behind. */
static char **copy_strings(struct program *program, const struct request *request, const char *key, struct failure *failure)
{
	struct msgpack_value list, item;
	if (!request_find(request, key, &list) || list.type != MSGPACK_ARRAY) {
		fail_call(failure, EINVAL, key);
		return NULL;
	}
	/* Each string takes at least its tag in the map, so the map's length bounds text and terminators. */
	char **strings = take_room(program, (list.length + 1) * sizeof(char *) + request->length);
	if (!strings) {
		fail_call(failure, ENOMEM, key);
		return NULL;
	}
	char *text = (char *)(strings + list.length + 1);
	struct msgpack_reader reader = {list.bytes, request->map + request->length};
	for (size_t i = 0; i < list.length; i++) {
		if (!msgpack_read_whole(&reader, &item) || item.type != MSGPACK_BYTES || memchr(item.bytes, 0, item.length)) {
			fail_call(failure, EINVAL, key);
			free_strings(program, strings);
			return NULL;
		}
		strings[i] = text;
		memcpy(text, item.bytes, item.length);
		text += item.length;
		*text++ = 0;
	}
	strings[list.length] = NULL;
	return strings;
}

static bool read_number(const struct msgpack_value *value, uint32_t *number)
{
	/* (uid_t)-1 means "leave it" to setresuid: a request for it would keep root. */
	if (value->type != MSGPACK_INTEGER || value->integer < 0 || value->integer >= UINT32_MAX)
		return false;
	*number = (uint32_t)value->integer;
	return true;
}

static bool read_identity(struct program *program, const struct request *request, struct failure *failure)
{
	struct msgpack_value value;
	if (!request_find(request, "uid", &value) || !read_number(&value, &program->uid))
		return fail_call(failure, EINVAL, "uid");
	if (!request_find(request, "gid", &value) || !read_number(&value, &program->gid))
		return fail_call(failure, EINVAL, "gid");
	if (!request_find(request, "groups", &value))
		return true;
	if (value.type != MSGPACK_ARRAY || value.length > PROGRAM_MAX_GROUPS)
		return fail_call(failure, EINVAL, "groups");
	struct msgpack_reader reader = {value.bytes, request->map + request->length};
	program->group_count = value.length;
	for (size_t i = 0; i < program->group_count; i++)
		if (!msgpack_read_whole(&reader, &value) || !read_number(&value, &program->groups[i]))
			return fail_call(failure, EINVAL, "groups");
	return true;
}

bool program_read(struct program *program, const struct request *request, struct failure *failure)
{
	program->argv = program->env = NULL;
	program->group_count = program->used = 0;
	if (!request_path(request, "cwd", program->cwd, failure) || !read_identity(program, request, failure))
		return false;
	program->argv = copy_strings(program, request, "argv", failure);
	if (!program->argv)
		return false;
	if (!program->argv[0] || !program->argv[0][0])
		return fail_call(failure, EINVAL, "argv");
	program->env = copy_strings(program, request, "env", failure);
	return program->env != NULL;
}

void program_free(struct program *program)
{
	free_strings(program, program->argv);
	free_strings(program, program->env);
	program->argv = program->env = NULL;
}
