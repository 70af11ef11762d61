# A Fibonacci number: 0, 1, 1, 2, 3, 5, ...
#
# Numbers of even and of odd index are kept with opposite signs, so that a subtraction adds.
#
# input n: 0 to max-1
# result f: the n-th Fibonacci number, wrapped to the word

        down n                  # n <- n + 1
loop:   two n done              # n <- n - 2; at most 0: nothing left to do
        minus_g f               # f <- f + g
        f minus_g               # g <- g + f
        zero zero loop
done:   down n down:-1          # n was even: halt; this -1 is the constant down
        f                       # n was odd: f <- g
        minus_g f
        zero zero -1            # halt

n:      . 11
f:      . 0
minus_g: . -1
two:    . 2
zero:   . 0
