/* A sorted array: an event is looked up by its number, renames and removals of whole trees are rare. */
#include "watched.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t place(const struct watched *watched, int number)
{
	size_t low = 0, high = watched->count;
	while (low < high) {
		size_t middle = low + (high - low) / 2;
		if (watched->dirs[middle].number < number)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static bool is_at(const struct watched *watched, size_t at, int number)
{
	return at < watched->count && watched->dirs[at].number == number;
}

static bool make_room(struct watched *watched)
{
	if (watched->count < watched->capacity)
		return true;
	size_t capacity = watched->capacity ? 2 * watched->capacity : 16;
	struct watched_dir *dirs = realloc(watched->dirs, capacity * sizeof(*dirs));
	if (!dirs)
		return false;
	watched->dirs = dirs;
	watched->capacity = capacity;
	return true;
}

bool watched_set(struct watched *watched, int number, const char *path, bool *fresh)
{
	size_t at = place(watched, number);
	*fresh = !is_at(watched, at, number);
	char *copy = strdup(path);
	if (!copy || !make_room(watched)) {
		free(copy);
		return false;
	}
	struct watched_dir *dir = watched->dirs + at;
	if (*fresh)
		memmove(dir + 1, dir, (watched->count++ - at) * sizeof(*dir));
	else
		free(dir->path);
	*dir = (struct watched_dir){number, copy};
	return true;
}

const char *watched_path(const struct watched *watched, int number)
{
	size_t at = place(watched, number);
	return is_at(watched, at, number) ? watched->dirs[at].path : NULL;
}

void watched_remove(struct watched *watched, int number)
{
	size_t at = place(watched, number);
	if (!is_at(watched, at, number))
		return;
	free(watched->dirs[at].path);
	watched->count--;
	memmove(watched->dirs + at, watched->dirs + at + 1, (watched->count - at) * sizeof(*watched->dirs));
}

/* What follows `above` in `path`: "" or "/…"; NULL when `path` is somewhere else. */
static const char *rest_below(const char *path, const char *above)
{
	size_t length = strlen(above);
	return !strncmp(path, above, length) && (!path[length] || path[length] == '/') ? path + length : NULL;
}

void watched_rename(struct watched *watched, const char *from, const char *to, size_t limit)
{
	for (size_t i = 0; i < watched->count; i++) {
		struct watched_dir *dir = watched->dirs + i;
		const char *rest = rest_below(dir->path, from);
		size_t size = rest ? strlen(to) + strlen(rest) + 1 : 0;
		char *path = rest && size <= limit ? malloc(size) : NULL;
		if (!path)
			continue;
		snprintf(path, size, "%s%s", to, rest);
		free(dir->path);
		dir->path = path;
	}
}

int watched_below(const struct watched *watched, const char *path)
{
	for (size_t i = 0; i < watched->count; i++)
		if (rest_below(watched->dirs[i].path, path))
			return watched->dirs[i].number;
	return -1;
}

void watched_free(struct watched *watched)
{
	for (size_t i = 0; i < watched->count; i++)
		free(watched->dirs[i].path);
	free(watched->dirs);
}
