/* The table of watched directories: what was set is found, and trees move and go as a whole. */
#include <string.h>

#include "../watched.h"
#include "check.h"

static void add(struct watched *watched, int number, const char *path, bool fresh)
{
	bool was_fresh;
	CHECK(watched_set(watched, number, path, &was_fresh));
	CHECK(was_fresh == fresh);
}

static struct watched tree(void)
{
	struct watched watched = {0};
	add(&watched, 1, "", true);
	add(&watched, 4, "a", true);
	add(&watched, 2, "a/b", true);
	add(&watched, 9, "ab", true);
	return watched;
}

static void what_was_set_is_found_in_any_order(void)
{
	struct watched watched = tree();
	CHECK(!strcmp(watched_path(&watched, 1), ""));
	CHECK(!strcmp(watched_path(&watched, 2), "a/b"));
	CHECK(!strcmp(watched_path(&watched, 9), "ab"));
	CHECK(!watched_path(&watched, 3) && !watched_path(&watched, 10));
	watched_free(&watched);
}

static void a_number_keeps_one_path(void)
{
	struct watched watched = tree();
	add(&watched, 2, "elsewhere", false);
	CHECK(!strcmp(watched_path(&watched, 2), "elsewhere") && watched.count == 4);
	watched_free(&watched);
}

static void a_tree_moves_as_a_whole_and_its_neighbour_stays(void)
{
	struct watched watched = tree();
	watched_rename(&watched, "a", "c/d", 100);
	CHECK(!strcmp(watched_path(&watched, 4), "c/d"));
	CHECK(!strcmp(watched_path(&watched, 2), "c/d/b"));
	CHECK(!strcmp(watched_path(&watched, 9), "ab"));
	watched_rename(&watched, "c", "much too long", 8);
	CHECK(!strcmp(watched_path(&watched, 4), "c/d"));
	watched_free(&watched);
}

static void a_tree_is_found_until_all_of_it_is_removed(void)
{
	struct watched watched = tree();
	int number, removed = 0;
	while ((number = watched_below(&watched, "a")) >= 0) {
		watched_remove(&watched, number);
		removed++;
	}
	CHECK(removed == 2 && watched.count == 2 && watched_path(&watched, 9));
	watched_remove(&watched, 77);
	CHECK(watched.count == 2);
	watched_free(&watched);
}

static void many_directories_fit(void)
{
	struct watched watched = {0};
	for (int number = 1000; number > 0; number--)
		add(&watched, number, number % 2 ? "odd" : "even", true);
	for (int number = 1; number <= 1000; number++)
		CHECK(!strcmp(watched_path(&watched, number), number % 2 ? "odd" : "even"));
	watched_free(&watched);
}

int main(void)
{
	RUN(what_was_set_is_found_in_any_order);
	RUN(a_number_keeps_one_path);
	RUN(a_tree_moves_as_a_whole_and_its_neighbour_stays);
	RUN(a_tree_is_found_until_all_of_it_is_removed);
	RUN(many_directories_fit);
	return 0;
}
