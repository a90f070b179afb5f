# memcpy, memmove, memset, memcmp, bcmp, strlen: what compiled code calls and no libc provides.
#
# Up to 256 bytes everything is loaded before anything is stored, with overlapping first and last
# vectors, so that memmove is the same code. Above, 128 bytes a turn; from HYV_REP_MIN bytes on, rep movsb or rep
# stosb (the runtime sets HYV_REP_MIN to all ones where those are slow: without ERMS, and under TCG).

.section .text.memcpy, "ax", @progbits
.code64

.balign 32
.globl memcpy
memcpy:
    mov %rdi, %rax
    cmp $256, %rdx
    ja hyv_copy_forward
hyv_copy_small:
    cmp $16, %rdx
    jbe 2f
    cmp $32, %rdx
    jbe 3f
    cmp $64, %rdx
    jbe 4f
    cmp $128, %rdx
    jbe 5f
    vmovdqu (%rsi), %ymm0
    vmovdqu 32(%rsi), %ymm1
    vmovdqu 64(%rsi), %ymm2
    vmovdqu 96(%rsi), %ymm3
    vmovdqu -128(%rsi,%rdx), %ymm4
    vmovdqu -96(%rsi,%rdx), %ymm5
    vmovdqu -64(%rsi,%rdx), %ymm6
    vmovdqu -32(%rsi,%rdx), %ymm7
    vmovdqu %ymm0, (%rdi)
    vmovdqu %ymm1, 32(%rdi)
    vmovdqu %ymm2, 64(%rdi)
    vmovdqu %ymm3, 96(%rdi)
    vmovdqu %ymm4, -128(%rdi,%rdx)
    vmovdqu %ymm5, -96(%rdi,%rdx)
    vmovdqu %ymm6, -64(%rdi,%rdx)
    vmovdqu %ymm7, -32(%rdi,%rdx)
    vzeroupper
    ret
2:  cmp $8, %edx
    jae 6f
    cmp $4, %edx
    jae 7f
    test %edx, %edx
    jz 8f
    movzbl (%rsi), %ecx                 # 1 to 3: first, middle, last
    mov %edx, %r8d
    shr $1, %r8d
    movzbl (%rsi,%r8), %r9d
    movzbl -1(%rsi,%rdx), %r10d
    mov %cl, (%rdi)
    mov %r9b, (%rdi,%r8)
    mov %r10b, -1(%rdi,%rdx)
8:  ret
7:  mov (%rsi), %ecx
    mov -4(%rsi,%rdx), %r8d
    mov %ecx, (%rdi)
    mov %r8d, -4(%rdi,%rdx)
    ret
6:  mov (%rsi), %rcx
    mov -8(%rsi,%rdx), %r8
    mov %rcx, (%rdi)
    mov %r8, -8(%rdi,%rdx)
    ret
3:  vmovdqu (%rsi), %xmm0
    vmovdqu -16(%rsi,%rdx), %xmm1
    vmovdqu %xmm0, (%rdi)
    vmovdqu %xmm1, -16(%rdi,%rdx)
    ret
4:  vmovdqu (%rsi), %ymm0
    vmovdqu -32(%rsi,%rdx), %ymm1
    vmovdqu %ymm0, (%rdi)
    vmovdqu %ymm1, -32(%rdi,%rdx)
    vzeroupper
    ret
5:  vmovdqu (%rsi), %ymm0
    vmovdqu 32(%rsi), %ymm1
    vmovdqu -64(%rsi,%rdx), %ymm2
    vmovdqu -32(%rsi,%rdx), %ymm3
    vmovdqu %ymm0, (%rdi)
    vmovdqu %ymm1, 32(%rdi)
    vmovdqu %ymm2, -64(%rdi,%rdx)
    vmovdqu %ymm3, -32(%rdi,%rdx)
    vzeroupper
    ret

# More than 256 bytes, destination not inside the source's tail: upwards. The last 128 bytes are loaded first, as a
# memmove may overwrite them.
.balign 32
hyv_copy_forward:
    cmp HYV_REP_MIN, %rdx
    jae 3f
    vmovdqu -128(%rsi,%rdx), %ymm4
    vmovdqu -96(%rsi,%rdx), %ymm5
    vmovdqu -64(%rsi,%rdx), %ymm6
    vmovdqu -32(%rsi,%rdx), %ymm7
    lea -128(%rdi,%rdx), %rcx           # where the last block goes
    vmovdqu (%rsi), %ymm8               # the first 32 bytes, so that the loop's stores are aligned
    mov %rdi, %r8
    lea 32(%rdi), %r9
    and $-32, %r9
    mov %r9, %r10
    sub %rdi, %r10
    add %r10, %rsi
    mov %r9, %rdi
.balign 32
2:  vmovdqu (%rsi), %ymm0
    vmovdqu 32(%rsi), %ymm1
    vmovdqu 64(%rsi), %ymm2
    vmovdqu 96(%rsi), %ymm3
    vmovdqa %ymm0, (%rdi)
    vmovdqa %ymm1, 32(%rdi)
    vmovdqa %ymm2, 64(%rdi)
    vmovdqa %ymm3, 96(%rdi)
    sub $-128, %rsi
    sub $-128, %rdi
    cmp %rcx, %rdi
    jb 2b
    vmovdqu %ymm4, (%rcx)
    vmovdqu %ymm5, 32(%rcx)
    vmovdqu %ymm6, 64(%rcx)
    vmovdqu %ymm7, 96(%rcx)
    vmovdqu %ymm8, (%r8)
    vzeroupper
    ret
3:  mov %rdx, %rcx
    rep movsb
    ret

.balign 32
.globl memmove
memmove:
    mov %rdi, %rax
    cmp $256, %rdx
    jbe hyv_copy_small
    mov %rdi, %rcx
    sub %rsi, %rcx
    cmp %rdx, %rcx
    jae hyv_move_forward                # the destination begins before the source, or after its end
    # Downwards; the first 128 bytes are loaded first.
    vmovdqu (%rsi), %ymm4
    vmovdqu 32(%rsi), %ymm5
    vmovdqu 64(%rsi), %ymm6
    vmovdqu 96(%rsi), %ymm7
2:  vmovdqu -32(%rsi,%rdx), %ymm0
    vmovdqu -64(%rsi,%rdx), %ymm1
    vmovdqu -96(%rsi,%rdx), %ymm2
    vmovdqu -128(%rsi,%rdx), %ymm3
    vmovdqu %ymm0, -32(%rdi,%rdx)
    vmovdqu %ymm1, -64(%rdi,%rdx)
    vmovdqu %ymm2, -96(%rdi,%rdx)
    vmovdqu %ymm3, -128(%rdi,%rdx)
    add $-128, %rdx
    cmp $128, %rdx
    ja 2b
    vmovdqu %ymm4, (%rdi)
    vmovdqu %ymm5, 32(%rdi)
    vmovdqu %ymm6, 64(%rdi)
    vmovdqu %ymm7, 96(%rdi)
    vzeroupper
    ret
# rep movsb is slow when the source lies less than a few lines above the destination.
hyv_move_forward:
    neg %rcx
    cmp $256, %rcx
    jae hyv_copy_forward
2:  vmovdqu (%rsi), %ymm0
    vmovdqu 32(%rsi), %ymm1
    vmovdqu %ymm0, (%rdi)
    vmovdqu %ymm1, 32(%rdi)
    add $64, %rsi
    add $64, %rdi
    sub $64, %rdx
    cmp $64, %rdx
    jae 2b
    vzeroupper
    jmp hyv_copy_small

.section .text.memset, "ax", @progbits
.balign 32
.globl memset
memset:
    mov %rdi, %rax
    movzbl %sil, %ecx
    cmp $16, %rdx
    jb 2f
    vmovd %ecx, %xmm0
    vpbroadcastb %xmm0, %ymm0
    cmp $32, %rdx
    jbe 3f
    cmp $64, %rdx
    jbe 4f
    cmp HYV_REP_MIN, %rdx
    jae 6f
    vmovdqu %ymm0, (%rdi)
    lea -64(%rdi,%rdx), %rcx
    vmovdqu %ymm0, (%rcx)
    vmovdqu %ymm0, 32(%rcx)
    add $32, %rdi
    and $-32, %rdi
    cmp %rcx, %rdi
    jae 1f
5:  vmovdqa %ymm0, (%rdi)
    vmovdqa %ymm0, 32(%rdi)
    add $64, %rdi
    cmp %rcx, %rdi
    jb 5b
1:  vzeroupper
    ret
6:  mov %rax, %r8
    mov %ecx, %eax
    mov %rdx, %rcx
    rep stosb
    mov %r8, %rax
    vzeroupper
    ret
3:  vmovdqu %xmm0, (%rdi)
    vmovdqu %xmm0, -16(%rdi,%rdx)
    vzeroupper
    ret
4:  vmovdqu %ymm0, (%rdi)
    vmovdqu %ymm0, -32(%rdi,%rdx)
    vzeroupper
    ret
2:  movabs $0x0101010101010101, %r8
    imul %r8, %rcx
    cmp $8, %edx
    jae 7f
    cmp $4, %edx
    jae 8f
    test %edx, %edx
    jz 9f
    mov %cl, (%rdi)
    mov %cl, -1(%rdi,%rdx)
    shr $1, %edx
    mov %cl, (%rdi,%rdx)
9:  ret
7:  mov %rcx, (%rdi)
    mov %rcx, -8(%rdi,%rdx)
    ret
8:  mov %ecx, (%rdi)
    mov %ecx, -4(%rdi,%rdx)
    ret

.section .text.memcmp, "ax", @progbits
.balign 32
.globl memcmp
.globl bcmp
bcmp:
memcmp:
    cmp $32, %rdx
    jb 5f
    lea -32(%rdx), %rcx                 # offset of the last, overlapping block
    xor %r8d, %r8d
2:  cmp %rcx, %r8
    cmovae %rcx, %r8
    vmovdqu (%rdi,%r8), %ymm0
    vpcmpeqb (%rsi,%r8), %ymm0, %ymm0
    vpmovmskb %ymm0, %eax
    inc %eax                            # zero where all 32 bytes are equal
    jnz 3f
    cmp %rcx, %r8
    je 4f
    add $32, %r8
    jmp 2b
4:  xor %eax, %eax
    vzeroupper
    ret
3:  tzcnt %eax, %eax                    # inc carried through the equal bytes to the first that differs
    add %rax, %r8
    movzbl (%rdi,%r8), %eax
    movzbl (%rsi,%r8), %ecx
    sub %ecx, %eax
    vzeroupper
    ret
5:  cmp $8, %edx
    jb 7f
    lea -8(%rdx), %rcx
    xor %r8d, %r8d
6:  cmp %rcx, %r8
    cmovae %rcx, %r8
    movbe (%rdi,%r8), %r9
    movbe (%rsi,%r8), %r10
    cmp %r10, %r9
    jne 9f
    cmp %rcx, %r8
    lea 8(%r8), %r8
    jne 6b
    xor %eax, %eax
    ret
7:  cmp $4, %edx
    jb 8f
    movbe (%rdi), %r9d
    movbe (%rsi), %r10d
    cmp %r10, %r9
    jne 9f
    movbe -4(%rdi,%rdx), %r9d
    movbe -4(%rsi,%rdx), %r10d
    cmp %r10, %r9
    jne 9f
    xor %eax, %eax
    ret
9:  sbb %eax, %eax                      # below: -1, above: 1
    or $1, %eax
    ret
8:  xor %ecx, %ecx
2:  cmp %ecx, %edx
    je 3f
    movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %r8d
    inc %ecx
    sub %r8d, %eax
    jz 2b
    ret
3:  xor %eax, %eax
    ret

.section .text.strlen, "ax", @progbits
.globl strlen
strlen:
    mov %rdi, %rax
2:  cmpb $0, (%rax)
    je 3f
    inc %rax
    jmp 2b
3:  sub %rdi, %rax
    ret

# What prebuilt core names and panic = "abort" never calls.
.section .text.rust_eh_personality, "ax", @progbits
.globl rust_eh_personality
.globl _Unwind_Resume
rust_eh_personality:
_Unwind_Resume:
    ud2
