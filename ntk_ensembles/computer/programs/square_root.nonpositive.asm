# The integer square root: 1 + 3 + 5 + ... + (2 k - 1) is k squared.
#
# input x: 0 to max
# result root: the largest integer whose square is at most x

        x debt                  # debt <- -x
loop:   minus_odd debt more     # debt <- debt + odd; at most 0: there was odd to take
        zero zero down:-1       # halt; the -1 here is the constant down
more:   down root               # root <- root + 1
        two minus_odd loop      # odd <- odd + 2; negative: always goes to loop

x:      . 90
root:   . 0
debt:   . 0
minus_odd: . -1
zero:   . 0
two:    . 2
