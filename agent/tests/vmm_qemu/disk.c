/* A guest that does nothing but read its virtio disk into RAM, several
   requests in flight, and checks what it gets. It never writes the buffers
   itself: their pages change by the VMM's DMA alone.

     0x200000  ticks
     0x202008  requests done   0x20200c  words found wrong */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__asm__(".section .note.pvh, \"a\", @note\n.balign 4\n.long 4, 4, 18\n.asciz \"Xen\"\n.long start\n"
	".text\n.globl start\nstart: cli\n movl $0x1ff000, %esp\n jmp run\n");

static inline void out8(u16 p, u8 v) { __asm__ volatile("outb %0, %1" :: "a"(v), "Nd"(p) : "memory"); }
static inline void out16(u16 p, u16 v) { __asm__ volatile("outw %0, %1" :: "a"(v), "Nd"(p) : "memory"); }
static inline void out32(u16 p, u32 v) { __asm__ volatile("outl %0, %1" :: "a"(v), "Nd"(p) : "memory"); }
static inline u16 in16(u16 p) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(p) : "memory"); return v; }
static inline u32 in32(u16 p) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(p) : "memory"); return v; }
#define FENCE __asm__ volatile("mfence" ::: "memory")

struct desc { u64 addr; u32 len; u16 flags, next; };
struct used { u32 id, len; };
struct head { u32 type, reserved; u64 sector; };

enum { FLIGHTS = 8, BUFFERS = 512, BUFFER = 64 << 10, SECTORS = BUFFER / 512, DISK_SECTORS = (32 << 20) / 512 };
#define RING ((volatile u8 *)0x300000)
#define HEADS ((volatile struct head *)0x310000)
#define STATUS ((volatile u8 *)0x311000)
#define BUFFER_AT(i) (0x1000000u + (i) * BUFFER)
#define TICKS (*(volatile u32 *)0x200000)
#define DONE (*(volatile u32 *)0x202008)
#define WRONG (*(volatile u32 *)0x20200c)

static u16 port, size;
static volatile struct desc *desc;
static volatile u16 *avail;
static volatile u8 *used_ring;
static u32 buffer_of[FLIGHTS], next_buffer, seed = 1;

static void submit(u32 flight) {
	u32 d = flight * 3, b = next_buffer++ % BUFFERS;
	seed = seed * 1664525 + 1013904223;
	buffer_of[flight] = b;
	HEADS[flight].type = 0;
	HEADS[flight].sector = (seed >> 8) % (DISK_SECTORS / SECTORS) * SECTORS;
	STATUS[flight] = 0xff;
	desc[d] = (struct desc){ (u32)&HEADS[flight], 16, 1, d + 1 };
	desc[d + 1] = (struct desc){ BUFFER_AT(b), BUFFER, 3, d + 2 };
	desc[d + 2] = (struct desc){ (u32)&STATUS[flight], 1, 2, 0 };
	avail[2 + avail[1] % size] = d;
	FENCE;
	avail[1]++;
	FENCE;
	out16(port + 16, 0);
}

static void check(u32 flight) {
	volatile u32 *words = (volatile u32 *)BUFFER_AT(buffer_of[flight]);
	u32 first = HEADS[flight].sector;
	if (STATUS[flight] != 0) WRONG++;
	for (u32 s = 0; s < SECTORS; s++)
		for (u32 w = 0; w < 128; w += 127)
			if (words[s * 128 + w] != (first + s) * 0x9e3779b1u + w) WRONG++;
}

__attribute__((noreturn)) void run(void) {
	for (u32 slot = 0; slot < 32; slot++) {
		u32 at = 0x80000000u | slot << 11;
		out32(0xcf8, at);
		if (in32(0xcfc) != 0x10011af4) continue;
		out32(0xcf8, at | 0x10);
		port = in32(0xcfc) & ~3u;
		out32(0xcf8, at | 4);
		out32(0xcfc, in32(0xcfc) | 5);
		break;
	}
	if (!port) for (;;) __asm__ volatile("hlt");
	out8(port + 18, 0);
	out8(port + 18, 3);
	out32(port + 4, 0);
	out16(port + 14, 0);
	size = in16(port + 12);
	desc = (volatile struct desc *)RING;
	avail = (volatile u16 *)(RING + 16 * size);
	used_ring = (volatile u8 *)(((u32)avail + 6 + 2 * size + 4095) & ~4095u);
	out32(port + 8, (u32)RING >> 12);
	out8(port + 18, 7);
	for (u32 f = 0; f < FLIGHTS; f++) submit(f);
	for (u16 seen = 0;;) {
		TICKS++;
		FENCE;
		if (*(volatile u16 *)(used_ring + 2) == seen) continue;
		u32 flight = ((volatile struct used *)(used_ring + 4))[seen++ % size].id / 3;
		check(flight);
		DONE++;
		submit(flight);
	}
}
