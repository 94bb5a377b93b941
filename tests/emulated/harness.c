/* Runs one native loop on another system: reads in.bin, calls `run` of the library, and writes out.bin.

   in.bin has 64-bit numbers, then the memory of each tensor: how many tensors, members and steps there are;
   for each tensor its bytes, and how far it moves from member to member and from step to step. */
#include <stddef.h>
#include <stdint.h>
#ifdef _WIN32
typedef void FILE;
FILE *fopen(const char *, const char *);
size_t fread(void *, size_t, size_t, FILE *), fwrite(const void *, size_t, size_t, FILE *);
int fclose(FILE *);
void *malloc(size_t), *LoadLibraryA(const char *), *GetProcAddress(void *, const char *);
void exit(int);
#define OPEN() LoadLibraryA("loop.dll")
#define FIND GetProcAddress
#define MAIN wWinMainCRTStartup /* where a program without a console begins */
#else
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#define OPEN() dlopen("./loop.so", RTLD_NOW)
#define FIND dlsym
#define MAIN main
#endif

typedef int64_t Run(int64_t, int64_t, int64_t, int64_t, char *const *, const int64_t *, const int64_t *, char *,
                    const volatile int *);

int MAIN(void) {
    static int64_t head[3], shape[999][3], member[999], time[999], result;
    static char *place[999];
    static volatile int stop;
    FILE *file = fopen("in.bin", "rb");
    if (!file || fread(head, 8, 3, file) != 3 || head[0] > 999) exit(2);
    fread(shape, 24, head[0], file);
    for (int i = 0; i < head[0]; i++) {
        place[i] = (char *)(((uintptr_t)malloc(shape[i][0] + 128) + 63) & ~(uintptr_t)63);
        if (fread(place[i], 1, shape[i][0], file) != shape[i][0]) exit(3);
        member[i] = shape[i][1];
        time[i] = shape[i][2];
    }
    fclose(file);
    void *library = OPEN();
    if (!library) exit(4);
    Run *run = (Run *)FIND(library, "run");
    char *memory = malloc(*(const int64_t *)FIND(library, "scratch_size") + 128);
    memory = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    /* In two parts, as Python runs a long loop. */
    result = run(0, head[1], 0, head[2] / 2, place, member, time, memory, &stop);
    if (result < 0) result = run(0, head[1], head[2] / 2, head[2], place, member, time, memory, &stop);
    file = fopen("out.bin", "wb");
    fwrite(&result, 8, 1, file);
    for (int i = 0; i < head[0]; i++) fwrite(place[i], 1, shape[i][0], file);
    fclose(file);
    exit(0);
}
