# Boot: from the PVH entry point to ring 3, and the tables that the nucleus lives by.
#
# All tables are data of the image; nothing is computed but control registers. Where ring 0 is
# emulated an instruction costs most of a microsecond, so there are few of them here. No vector
# instruction may run in ring 0.

.section .note.pvh, "a", @note
.balign 4
    .long 4, 4, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long hyv_start

.section .nucleus.text, "ax", @progbits
hyv_nucleus:
.code32
.globl hyv_start
hyv_start:
    cli
    cld
    mov %ebx, %esi                      # start info, kept up to ring 3

    # XSAVE, or a KVM, which may hide it (see hyv_probe). TCG would hang at the write to CR4.
    mov $1, %eax
    cpuid
    bt $26, %ecx
    jc 1f
    mov $0x40000000, %eax
    cpuid
    cmp $0x4b4d564b, %ebx               # "KVMK"
    jne hyv_no_v3
    # Long mode and NX.
1:  mov $0x80000001, %eax
    cpuid
    and $0x20100000, %edx
    cmp $0x20100000, %edx
    jne hyv_no_v3

    mov $hyv_pml4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x620, %eax                     # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $0xc0000080, %ecx               # EFER
    xor %edx, %edx
    mov $0x900, %eax                    # LME, NXE
    wrmsr
    mov $0x80010033, %eax               # CR0: PG, WP, NE, ET, MP, PE; no EM, no TS
    mov %eax, %cr0
    lgdt hyv_gdtr
    ljmp $8, $1f
.code64
1:  mov $0x10, %eax
    mov %eax, %ss
    mov $0x23, %eax
    mov %eax, %ds
    mov %eax, %es
    mov ${RING0_STACK_TOP}, %esp
    lidt hyv_idtr
    mov $0x28, %eax
    ltr %ax
    # Enable the local APIC, and mask the line that the old interrupt controller would use.
    movabs ${LAPIC}, %rax
    movl ${SVR}, 0xf0(%rax)
    movl $0x10000, 0x350(%rax)
hyv_probe_ring0:                        # an exception from here to hyv_probe_ring0_end: this CPU lacks AVX
    mov %cr4, %rax
    or $0x40000, %eax                   # OSXSAVE
    mov %rax, %cr4
    xor %ecx, %ecx
    xor %edx, %edx
    mov $7, %eax                        # XCR0: x87, SSE, AVX
    xsetbv
hyv_probe_ring0_end:
    pushq $0x23
    pushq ${MAIN_STACK_TOP}
    pushq $0x202                        # interrupts on, IOPL 0
    pushq $0x1b
    pushq $hyv_ring3
    iretq

# Valid as 32-bit and as 64-bit code.
hyv_no_v3:
    mov $hyv_no_v3_text, %ecx
    mov $0x3f8, %edx
1:  mov (%rcx), %al
    test %al, %al
    jz 2f
    out %al, %dx
    add $1, %ecx
    jmp 1b
2:  mov ${EXIT_PORT}, %edx
    mov ${EXIT_FAILURE}, %eax
    out %eax, %dx
    cli
    hlt
    jmp 2b
hyv_no_v3_text:
    .asciz "hyv: this CPU lacks x86-64-v3 (AVX2, BMI2, FMA, ...): with KVM use -cpu host, with TCG -cpu max\r\n"

.section .nucleus.data, "aw", @progbits
.balign 4096
hyv_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 ring 0 code
    .quad 0x00cf93000000ffff            # 0x10 ring 0 data
    .quad 0x00affb000000ffff            # 0x18 ring 3 code
    .quad 0x00cff3000000ffff            # 0x20 ring 3 data
    .word hyv_tss_end - hyv_tss - 1     # 0x28 TSS
    .word {TSS_LOW}
    .byte {TSS_MID}, 0x89, 0, 0
    .quad 0
hyv_gdt_end:

    .org 0x80
hyv_tss:
    .long 0
    .quad {RING0_STACK_TOP}
    .quad 0, 0, 0
    .quad {DOUBLE_FAULT_STACK_TOP}      # IST 1
    .quad 0, 0, 0, 0, 0, 0, 0
    .word 0
    .word hyv_ports - hyv_tss
# I/O permission: a zero bit lets ring 3 use the port.
hyv_ports:
    .fill 4, 1, 0xff
    .byte 0xfc                          # 0x20-0x21 interrupt controller
    .fill 3, 1, 0xff
    .byte 0xf0                          # 0x40-0x43 timer
    .fill 3, 1, 0xff
    .byte 0xfd                          # 0x61 timer gate
    .fill 7, 1, 0xff
    .byte 0xfc                          # 0xa0-0xa1 interrupt controller
    .fill 9, 1, 0xff
    .byte 0x0f                          # 0xf4-0xf7 exit
    .fill 96, 1, 0xff
    .byte 0x00                          # 0x3f8-0x3ff COM1
    .fill 287, 1, 0xff
    .byte 0x00                          # 0xcf8-0xcff PCI
    .byte 0xff
hyv_tss_end:

.macro hyv_gate target, ist, type
    .word \target - hyv_nucleus
    .word 8
    .byte \ist, \type
    .word 0x20
    .quad 0
.endm
    .org 0x400
hyv_idt:
    .irp n, 0, 1, 2
    hyv_gate hyv_exc_\n, 0, 0x8e
    .endr
    hyv_gate hyv_service, 0, 0xee       # int3, callable from ring 3
    .irp n, 4, 5, 6, 7
    hyv_gate hyv_exc_\n, 0, 0x8e
    .endr
    hyv_gate hyv_exc_8, 1, 0x8e
    .irp n, 9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    hyv_gate hyv_exc_\n, 0, 0x8e
    .endr
    .rept {WAKE_VECTOR} - 32
    hyv_gate hyv_ignore, 0, 0x8e
    .endr
    hyv_gate hyv_wake, 0, 0x8e
    .rept 63 - {WAKE_VECTOR}
    hyv_gate hyv_ignore, 0, 0x8e
    .endr
hyv_idt_end:

hyv_gdtr:
    .word hyv_gdt_end - hyv_gdt - 1
    .quad hyv_gdt
    .balign 8
hyv_idtr:
    .word hyv_idt_end - hyv_idt - 1
    .quad hyv_idt
    .balign 8
hyv_reporting:
    .quad 0

# Page tables. Flags: present 1, writable 2, user 4, write-through 8, no cache 0x10, accessed 0x20, dirty 0x40,
# 2 MiB page 0x80, no-execute 1 << 63.
.balign 4096
hyv_pml4:
    .quad hyv_pdpt + 0x27
    .fill 511, 8, 0
hyv_pdpt:
    .quad hyv_pd + 0x27
    .fill 510, 8, 0
    .quad hyv_pd_devices + 0x27
hyv_pd:                                 # the first GiB
    .quad hyv_pt_low + 0x27
    .quad hyv_pt_image + 0x27
    .quad hyv_pt_image + 4096 + 0x27
    .set hyv_page, 0x600000
    .rept 509
    .quad hyv_page + 0x80000000000000e7
    .set hyv_page, hyv_page + 0x200000
    .endr
hyv_pd_devices:
    .quad {BAR0_PHYS} + 0x80000000000000ff
    .quad {BAR2_PHYS} + 0x80000000000000e7
    .quad {LAPIC_PHYS} + 0x80000000000000fb
    .fill 509, 8, 0
.macro hyv_pages first, count, flags
    .set hyv_page, \first
    .rept \count
    .quad hyv_page + \flags
    .set hyv_page, hyv_page + 0x1000
    .endr
.endm
hyv_pt_low:
    .quad 0                                                 # 0x0: null
    hyv_pages 0x1000, 0x3f, 0x8000000000000065              # 0x1000: start info, command line
    .fill 0x10, 8, 0                                        # 0x40000: guard
    hyv_pages 0x50000, 0x10, 0x8000000000000067             # 0x50000: the reporter's stack
    .fill 0x20, 8, 0
    hyv_pages 0x80000, 0x20, 0x8000000000000065             # 0x80000: firmware data
    .fill 0x20, 8, 0                                        # 0xa0000: no RAM
    hyv_pages 0xc0000, 0x40, 0x8000000000000065             # 0xc0000: firmware data
    .fill 0x10, 8, 0                                        # 0x100000: guard
    hyv_pages 0x110000, 0xf0, 0x8000000000000067            # 0x110000: main stack
.globl hyv_pt_image
hyv_pt_image:
    .quad 0x200000 + 0x21                                   # ring 0 code: execute, supervisor
    hyv_pages 0x201000, 8, 0x8000000000000063               # its data: supervisor
    .quad 0                                                 # guard
    .quad 0x20a000 + 0x8000000000000063                     # ring 0 stack
    .quad 0                                                 # guard
    .quad 0x20c000 + 0x8000000000000063                     # double fault stack
    .fill 3, 8, 0
    .set hyv_page, 0x210000
.macro hyv_blocks from:vararg
    .irp n, \from
    .rept 16
    .quad hyv_page + hyv_block_\n
    .set hyv_page, hyv_page + 0x1000
    .endr
    .endr
.endm
    hyv_blocks 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21
    hyv_blocks 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42
    hyv_blocks 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63

.section .text.hyv_ring3, "ax", @progbits
hyv_ring3:
    xor %ebp, %ebp
# One instruction of each part of x86-64-v3, before compiled code uses any. CPUID does not say: where KVM has no hardware
# under it, it hides what ring 3 can do. An exception from here to hyv_probe_end says no.
hyv_probe:
    popcnt %esi, %eax
    vpxor %ymm0, %ymm0, %ymm0           # AVX2
    vpshufb %xmm0, %xmm0, %xmm1
    vptest %xmm0, %xmm0
    vpcmpgtq %xmm0, %xmm0, %xmm1        # SSE4.2, as AVX
    vfmadd213ps %ymm0, %ymm0, %ymm0
    vcvtph2ps %xmm0, %ymm0              # F16C
    vzeroupper
    andn %eax, %eax, %ecx               # BMI1
    blsr %eax, %ecx
    shlx %eax, %eax, %ecx               # BMI2
    mulx %eax, %ecx, %ecx
    rorx $1, %eax, %ecx
    movbe -8(%rsp), %ecx
    xor %ebx, %ebx
    xor %ecx, %ecx
    cmpxchg16b -16(%rsp)
    mov $1, %eax
    lzcnt %eax, %eax                    # 31; without LZCNT it is bsr, which says 0
    cmp $31, %eax
    je hyv_probe_end
    ud2
hyv_probe_end:
    mov %esi, %edi
    call hyv_runtime_start
    ud2
