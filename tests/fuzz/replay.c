/* replay.c: a main for the fuzzers where there is no fuzzing engine: runs each file, and those in each folder. */
#define _POSIX_C_SOURCE 200809L
#include <dirent.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int n_replayed;

static void need(bool true_that, const char *path) {
    if (true_that) return;
    perror(path);
    exit(1);
}

static void replay_file(const char *path) {
    FILE *file = fopen(path, "rb");
    need(file != NULL, path);
    need(fseek(file, 0, SEEK_END) == 0, path);
    const long size = ftell(file);
    need(size >= 0, path);
    rewind(file);
    uint8_t *data = malloc(size > 0 ? (size_t)size : 1);
    need(data != NULL && fread(data, 1, (size_t)size, file) == (size_t)size, path);
    fclose(file);
    (void)LLVMFuzzerTestOneInput(data, (size_t)size);
    free(data);
    n_replayed++;
}

static void replay(const char *path) {
    struct stat about;
    need(stat(path, &about) == 0, path);
    if (!S_ISDIR(about.st_mode)) {
        replay_file(path);
        return;
    }
    DIR *folder = opendir(path);
    need(folder != NULL, path);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        char inside[4096];
        need(snprintf(inside, sizeof inside, "%s/%s", path, entry->d_name) < (int)sizeof inside,
             path);
        replay(inside);
    }
    closedir(folder);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) replay(argv[i]);
    printf("%s: %d inputs replayed\n", argv[0], n_replayed);
    return n_replayed > 0 ? 0 : 1;
}
